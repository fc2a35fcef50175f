"""RMSNorm in few passes has the values and gradients of torch's own."""

import pytest
import torch
import torch.nn.functional as F

from megatron_rl.policy.rms_norm import rms_norm

EPS = 1e-6
SHAPES = {"hidden": (7, 1, 48), "heads": (5, 1, 3, 16), "one": (1, 8)}


def both(x, weight, grad):
    """Return outputs and gradients of torch's function and of this one."""
    found = []
    for function in (lambda x, w: F.rms_norm(x, w.shape, w, EPS), lambda x, w: rms_norm(x, w, EPS)):
        inputs = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
        output = function(*inputs)
        found.append([output, *torch.autograd.grad(output, inputs, grad)])
    return found


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_values_and_gradients_are_those_of_torch(shape, dtype, tolerance):
    torch.manual_seed(0)
    x, grad, weight = (torch.randn(size, dtype=dtype) for size in (shape, shape, shape[-1:]))
    x[0] *= 1e4
    x[-1] *= 1e-5  # small enough that eps matters
    for theirs, ours in zip(*both(x, weight, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.detach().abs().max()))


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(1)
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((4, 2, 8), (8,))]
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), inputs)


def test_rows_that_do_not_lie_side_by_side():
    """Queries, keys and values of a head come in one tensor."""
    torch.manual_seed(2)
    mixed = torch.randn(6, 1, 2, 24)
    x = mixed[..., 8:16]
    assert not x.is_contiguous()
    for theirs, ours in zip(*both(x, torch.randn(8), torch.randn(2, 1, 6, 8).transpose(0, 2)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_row_of_zeros_has_no_gradient_that_is_not_finite():
    ours = both(torch.zeros(2, 8), torch.ones(8), torch.ones(2, 8))[1]
    assert not ours[0].any() and torch.isfinite(ours[1]).all()


def test_sixteen_bits_are_torchs_own():
    x, weight = torch.randn(3, 16, dtype=torch.bfloat16), torch.randn(16, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, EPS), F.rms_norm(x, weight.shape, weight, EPS))
