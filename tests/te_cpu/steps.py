"""Functions that ranks with Transformer Engine's layers run. Common arguments: `tests.parallel.steps`."""

from pathlib import Path
from typing import Any

import torch

from tests.gpu import te
from tests.parallel.steps import make_policy
from tests.unit.policy.test_host_syncs import count


def layers(model: Path, layout: dict[str, Any]) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """Return the classes of Transformer Engine that a policy is made of, and on rank 0 names and shapes it exports."""
    policy = make_policy(model, layout)
    kinds = {kind for chunk in policy.models for part in chunk.modules() for kind in type(part).__mro__}
    names = {kind.__name__ for kind in kinds if kind.__module__.startswith("transformer_engine.pytorch")}
    names |= {
        kind.__name__
        for part in policy.optimizer.core.chained_optimizers
        for kind in type(part.optimizer).__mro__
        if kind.__module__.startswith("transformer_engine.pytorch")
    }
    return names, {name: tuple(tensor.shape) for name, tensor in policy.export() if tensor is not None}


def call(name: str, *args: Any) -> str:
    """Call a function of the compiled module. Return the error."""
    from tests.te_cpu.port import compiled_module  # the port must come first

    try:
        getattr(compiled_module(), name)(*args)
    except NotImplementedError as error:
        return str(error)
    return "no error"


def quantize(kind: str) -> str:
    """Quantize with a block-scaling quantizer of Transformer Engine. Return the error."""
    x = torch.zeros(128, 128, dtype=torch.bfloat16)
    try:
        te.mxfp8(x, "e4m3") if kind == "mxfp8" else te.blockwise(x, "e4m3", square=True, pow2=True)
    except NotImplementedError as error:
        return str(error)
    return "no error"


def copies(model: Path, budget: int) -> int:
    """Return how many copies to the device one update makes in micro-batches of `budget` tokens, on two replicas."""
    return count(model, budget, layout={"data": 2}).copies
