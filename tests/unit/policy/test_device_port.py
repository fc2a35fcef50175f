"""The device port without a model: what it takes out of megatron-core and torch on a machine without CUDA."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA nothing is ported")
ROOT = Path(__file__).resolve().parents[3]


JIT = """
import sys
import megatron_rl.policy
jit = sys.modules["megatron.core.jit"]
assert jit.jit_fuser(len) is len
print(*vars(jit))
"""


def test_the_stand_in_for_megatron_core_s_jit_has_all_its_names():
    spec = importlib.util.find_spec("megatron")
    assert spec is not None and spec.submodule_search_locations is not None
    source = Path(next(iter(spec.submodule_search_locations)), "core", "jit.py").read_text(encoding="utf-8")
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    assert {"jit_fuser", "disable_jit_fuser"} <= names <= set(output_of(JIT).split())


ADAM = """
import importlib, sys, torch
import megatron_rl.policy
from megatron_rl.policy.device_port import install_cpu_port

def train(kind):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    optimizer = kind([{"params": [p]} for p in model.parameters()], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().sum().backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        assert torch.is_grad_enabled()
    return torch.nn.utils.parameters_to_vector(model.parameters())

install_cpu_port()
ported = train(importlib.import_module("megatron.core.optimizer").torch.optim.AdamW)
assert "torch._dynamo" not in sys.modules
assert torch.equal(ported, train(torch.optim.AdamW))
print("torch._dynamo" in sys.modules)
"""


def test_the_optimizer_steps_as_torch_s_does_without_importing_the_compiler():
    assert output_of(ADAM) == "True\n", "torch's own optimizer no longer imports the compiler: the port need not either"


def output_of(code: str, *arguments: str) -> str:
    """Standard output of a new process, in which nothing has been imported."""
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
