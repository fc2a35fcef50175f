"""The fused Adam that megatron-core takes on a GPU makes torch's step: Transformer Engine's, or NVIDIA apex's."""

import importlib
import importlib.util

import pytest
import torch

from tests.gpu.needs import HAVE_TE, needs_cuda

HAVE_APEX = importlib.util.find_spec("amp_C") is not None
KINDS = [
    pytest.param("transformer_engine.pytorch.optimizers", marks=pytest.mark.skipif(not HAVE_TE, reason="needs TE")),
    pytest.param("apex.optimizers", marks=pytest.mark.skipif(not HAVE_APEX, reason="needs NVIDIA apex")),
]


@needs_cuda
@pytest.mark.parametrize("module", KINDS)
def test_three_steps_of_fused_adam_are_those_of_torch(module: str):
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(size, generator=generator) for size in ((257,), (64, 129))]
    fused, plain = ([torch.nn.Parameter(x.clone().cuda()) for x in start] for _ in range(2))
    ours = importlib.import_module(module).FusedAdam(fused, adam_w_mode=True, **settings)
    theirs = torch.optim.AdamW(plain, **settings)
    for _ in range(3):
        for a, b in zip(fused, plain, strict=True):
            a.grad = torch.randn(a.shape, generator=generator).cuda()
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
