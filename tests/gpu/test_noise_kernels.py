"""The noise on a GPU equals the noise on a CPU: the integers are equal, the normals are equal up to rounding."""

import numpy as np
import pytest
import torch

from megatron_rl.alp.noise import NoiseRows, noise_key, normals, philox4x32
from megatron_rl.alp.perturb import Perturb, add_noise, add_noise_, dot_noise
from megatron_rl.policy.device_copy import on_device
from tests.gpu.needs import needs_cuda

philox_words = pytest.importorskip("tests.gpu.philox_words", reason="triton is not installed")
pytestmark = needs_cuda
KEYS = [(0, 0), noise_key(0, 3, 2), noise_key(5, 10**6, 47), (2**32 - 1, 2**31)]
DEVICE = "cuda"


def rows_of(count: int) -> NoiseRows:
    generator = torch.Generator().manual_seed(0)
    return NoiseRows(torch.arange(count) * 997, torch.randint(-(2**62), 2**62, (count,), generator=generator))


def on_gpu(rows: NoiseRows) -> NoiseRows:
    return on_device(rows, torch.device(DEVICE))


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_integers_are_equal_bit_for_bit(key):
    counter = np.random.default_rng(1).integers(0, 2**32, (1000, 4), dtype=np.uint32)
    counter[0], counter[1] = 0, 2**32 - 1
    expected = np.stack(philox4x32(tuple(np.ascontiguousarray(counter[:, i]) for i in range(4)), key), 1)
    found = philox_words.words(torch.from_numpy(counter.astype(np.int64)).to(DEVICE), key)
    assert np.array_equal(found.cpu().numpy(), expected.astype(np.int64))


@pytest.mark.parametrize(("width", "first"), [(64, 0), (2100, 0), (4096, 0), (37, 3)])
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_normals_are_equal_up_to_rounding(width, first, key):
    rows = rows_of(33)
    found = add_noise_(torch.zeros(33, width, device=DEVICE), torch.ones(1, device=DEVICE), on_gpu(rows), key, first)
    torch.testing.assert_close(found.cpu(), normals(rows, key, width, first), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_perturbed_state_is_rounded_once_and_is_the_same_every_time(dtype):
    rows, key, sigma = rows_of(16), noise_key(1, 2, 3), torch.tensor([0.1])
    hidden = torch.randn(16, 512, generator=torch.Generator().manual_seed(4)).to(dtype)
    ours = add_noise(hidden.to(DEVICE), sigma.to(DEVICE), on_gpu(rows), key)
    again = add_noise(hidden.to(DEVICE), sigma.to(DEVICE), on_gpu(rows), key)
    assert ours.dtype == dtype and torch.equal(ours, again)
    exact = hidden.double() + 0.1 * normals(rows, key, 512).double()
    half_step = torch.finfo(dtype).eps / 2 * exact.abs()
    assert bool(((ours.cpu().double() - exact).abs() <= half_step + 1e-6).all())


def test_the_gradient_of_sigma_is_that_of_a_cpu_and_repeats():
    rows, key = rows_of(64), noise_key(2, 0, 1)
    grad = torch.randn(64, 1024, generator=torch.Generator().manual_seed(5))
    expected = dot_noise(grad, rows, key)
    found = [dot_noise(grad.to(DEVICE), on_gpu(rows), key) for _ in range(2)]
    assert torch.equal(found[0], found[1])
    assert abs(float(found[0]) - float(expected)) < 1e-6 * float(grad.abs().sum())
    gradients = []
    for device in ("cpu", DEVICE):
        log_sigma = torch.tensor([-2.0], device=device, requires_grad=True)
        Perturb.apply(
            torch.zeros_like(grad, device=device), log_sigma, on_device(rows, torch.device(device)), key
        ).backward(grad.to(device))
        gradients.append(float(log_sigma.grad))
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-4)
