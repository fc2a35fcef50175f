"""The GPU kernels, run by triton's interpreter on a CPU, against the CPU's own noise."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be interpreted")

CHECK = """
import torch
from megatron_rl.perturbation import kernels, noise

generator = torch.Generator().manual_seed(0)
rows = noise.NoiseRows(torch.arange(37) * 1000, torch.randint(-(2**62), 2**62, (37,), generator=generator))
for hidden in (64, 100):
    for seed in (0, 5):
        key = noise.noise_key(seed, 3, 2)
        eps = noise.normals(rows, key, hidden)
        alone = kernels.add_noise(torch.zeros(37, hidden), torch.ones(1), rows, key)
        assert (alone - eps).abs().max() < 1e-6, (alone - eps).abs().max()
        x = torch.randn(37, hidden, generator=generator)
        for dtype, close in ((torch.float32, 1e-6), (torch.bfloat16, 2**-6)):
            ours = kernels.add_noise(x.to(dtype), torch.tensor([0.1]), rows, key)
            assert ours.dtype == dtype and (ours.float() - (x.to(dtype) + 0.1 * eps).float()).abs().max() < close
        expected = (x.double() * eps.double()).sum()
        assert abs(kernels.dot_noise(x, rows, key) - expected) < 1e-4 * (1 + abs(expected))
print("same noise")
"""


def test_interpreted_kernels_add_and_sum_the_noise_of_the_cpu():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", CHECK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "same noise\n", done.stderr
