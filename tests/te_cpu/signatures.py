"""The calls of this project into Transformer Engine, bound to its real signatures. Run by ranks with its package."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import torch
from megatron.core.fp4_utils import get_fp4_recipe
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.config import make_config
from megatron_rl.policy.quantized_products import transformer_engine_recipe
from megatron_rl.precision.machine import RECIPES
from tests.gpu import te
from tests.policies import embedded_plan

# What `tests.gpu.te` makes and calls, by module.
CALLED = {
    "transformer_engine.pytorch.tensor.float8_tensor": ("Float8CurrentScalingQuantizer", "Float8Quantizer"),
    "transformer_engine.pytorch.tensor.float8_blockwise_tensor": ("Float8BlockQuantizer",),
    "transformer_engine.pytorch.tensor.mxfp8_tensor": ("MXFP8Quantizer",),
    "transformer_engine.pytorch": ("Linear", "autocast"),
}


def _binding(function: Any) -> Callable[..., Any]:
    """Return a function that only binds its arguments to the signature of another one."""
    signature = inspect.signature(function)

    def bind(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        bound.append(function.__name__)
        return MagicMock()

    return bind


bound: list[str] = []


def bind_all() -> list[str]:
    """Call every function of `tests.gpu.te`. Return the names that were called. Raise TypeError for a misfit."""
    bound.clear()
    kept = {
        (module, name): getattr(importlib.import_module(module), name) for module in CALLED for name in CALLED[module]
    }
    for (module, name), function in kept.items():
        setattr(importlib.import_module(module), name, _binding(function))
    x, te.torch = torch.zeros(128, 128), importlib.import_module("megatron.core.extensions.transformer_engine").torch
    try:
        te.current(x, "e4m3", pow2=True)
        te.blockwise(x, "e4m3", square=True, pow2=False)
        te.mxfp8(x, "e5m2")
        te.linear(128, 128, x)
        te.autocast(te.block_recipe(pow2=True, hybrid=True))
        te.delayed(x, "e4m3", MagicMock())
    finally:
        te.torch = torch
        for (module, name), function in kept.items():
            setattr(importlib.import_module(module), name, function)
    return sorted(bound)


def recipes() -> dict[str, dict[str, Any]]:
    """Return what megatron-core makes of each of our recipes: the classes, and whether scales are powers of two."""
    made = {}
    for name in RECIPES:
        for pow2 in (False, True) if name == "blockwise" else (False,):
            config = make_config(
                {"model": {"path": "m"}, "precision": {"recipe": name, "train": "bf16", "pow2_scales": pow2}}
            )
            fields = transformer_engine_recipe(config, embedded_plan(config.precision, 4))
            core = TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4, bf16=True, **fields)
            recipe = get_fp4_recipe(core) if core.fp4 else get_fp8_recipe(core)
            weight = getattr(recipe, "fp8_quant_fwd_weight", None)
            made[f"{name}{' pow2' if pow2 else ''}"] = {
                "is": [kind.__name__ for kind in type(recipe).__mro__],
                "pow2": None if weight is None else weight.power_2_scale,
            }
    return made
