"""Functions that ranks with Transformer Engine's layers run. Common arguments: `tests.parallel.steps`."""

from pathlib import Path
from typing import Any

from tests.parallel.steps import make_policy


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
