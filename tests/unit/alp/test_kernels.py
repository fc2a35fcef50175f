"""The GPU kernels compute the same noise as the CPU code. triton's interpreter runs them on a CPU here."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be interpreted")

CHECK = """
import torch
from megatron_rl.alp import kernels, noise

generator = torch.Generator().manual_seed(0)
rows = noise.NoiseRows(torch.arange(6) * 1000, torch.randint(-(2**62), 2**62, (6,), generator=generator))
for hidden in (64, 2100):
    for seed in (0, 5):
        key = noise.noise_key(seed, 3, 2)
        eps = noise.normals(rows, key, hidden)
        alone = kernels.launch_add_noise(torch.zeros(6, hidden), torch.ones(1), rows, key)
        assert (alone - eps).abs().max() < 1e-6, (alone - eps).abs().max()
        x = torch.randn(6, hidden, generator=generator)
        for dtype, close in ((torch.float32, 1e-6), (torch.bfloat16, 2**-4)):
            ours = kernels.launch_add_noise(x.to(dtype), torch.tensor([0.1]), rows, key)
            assert ours.dtype == dtype and (ours.float() - (x.to(dtype) + 0.1 * eps).float()).abs().max() < close
        expected = (x.double() * eps.double()).sum()
        assert abs(kernels.launch_dot_noise(x, rows, key) - expected) < 1e-4 * (1 + abs(expected))
key = noise.noise_key(1, 3, 2)
whole = noise.normals(rows, key, 2200)
for first, width in ((0, 130), (130, 129), (7, 1), (3, 2100)):
    x = torch.zeros(6, width)
    assert kernels.launch_add_noise(x, torch.ones(1), rows, key, first, out=x) is x
    assert (x - whole[:, first : first + width]).abs().max() < 1e-6
    expected = (x.double() * whole[:, first : first + width]).sum()
    assert abs(kernels.launch_dot_noise(x, rows, key, first) - expected) < 1e-4 * expected
print("same noise")
"""


def test_interpreted_kernels_add_and_sum_the_noise_of_the_cpu():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", CHECK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "same noise\n", done.stderr


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_rl.alp import kernels

names = {"positions": "*i64", "ids": "*i64", "k0": "i32", "k1": "i32", "first": "i32", "width": "i32", \
"BLOCK": "constexpr"}
add = {"hidden": "*bf16", "sigma": "*fp32", "out": "*bf16"}
dot = {"grad": "*bf16", "parts": "*fp32"}
for kernel, own in ((kernels._add_noise, add), (kernels._dot_noise, dot)):
    signature = {name: {**names, **own}[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={"BLOCK": 512})
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert "mul.hi.u32" in text
    print([word for word in ("approx", ".local", ".f64") if word in text])
"""


def test_compiled_kernels_use_no_approximate_function_and_no_slow_path():
    """An approximate logarithm has an error of 4e-4 near 1."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "[]\n[]\n", done.stdout + done.stderr
