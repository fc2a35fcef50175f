"""Every call of torch.distributed in the package binds to the signature that the installed torch has.

Calls with NCCL run on GPUs alone. A renamed argument would be found there.
"""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

import megatron_rl

PACKAGE = Path(megatron_rl.__file__).parent
MODULES = {"dist": dist, "distributed_c10d": distributed_c10d}


def calls_in(source: str) -> Iterator[tuple[int, str, str, ast.Call]]:
    """Yield line, module, name and call of each `module.name(...)` of `MODULES`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=module), attr=name)) if module in MODULES:
                yield node.lineno, module, name, node


def misfit(module: str, name: str, call: ast.Call) -> str | None:
    """Return why a call does not bind, None if it does or if its arguments are only known at run time."""
    function = getattr(MODULES[module], name, None)
    if function is None:
        return f"torch has no {module}.{name}"
    if any(isinstance(arg, ast.Starred) for arg in call.args) or any(key.arg is None for key in call.keywords):
        return None
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a compiled class, whose constructors are in its docstring
        return None
    try:
        signature.bind(*call.args, **{str(key.arg): key.value for key in call.keywords})
    except TypeError as error:
        return f"{module}.{name}: {error}"
    return None


def test_every_call_binds():
    found = [
        (f"{path.relative_to(PACKAGE)}:{line}", name, misfit(module, name, call))
        for path in PACKAGE.rglob("*.py")
        for line, module, name, call in calls_in(path.read_text(encoding="utf-8"))
    ]
    assert {"init_process_group", "_new_process_group_helper", "all_reduce", "broadcast_object_list"} <= {
        name for _, name, _ in found
    }
    assert [(place, reason) for place, _, reason in found if reason] == []


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("dist.all_reduce(x, operation=1)", "unexpected keyword argument 'operation'"),
        ("dist.new_group(1, 2, 3, 4, 5, 6, 7, 8, 9)", "too many positional arguments"),
        ("distributed_c10d._rename_me(x)", "torch has no distributed_c10d._rename_me"),
    ],
)
def test_a_call_that_does_not_bind_is_found(source, reason):
    ((_, *call),) = calls_in(source)
    assert reason in str(misfit(*call))
