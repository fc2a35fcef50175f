"""Checks that a mismatch can be attributed, before anything is computed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rl.errors import ConfigError, PrecisionError
from megatron_rl.precision.machine import Machine, this_machine
from megatron_rl.precision.plan import PrecisionPlan


def check_replayable(plan: PrecisionPlan, machine: Machine | None = None) -> None:
    """Raise PrecisionError if the trainer's layers cannot compute without their own recipe.

    `machine` defaults to this one.
    """
    if (machine or this_machine()).transformer_engine and (plan.trains_low or plan.quantizes_inputs):
        raise PrecisionError(
            "the mismatch of quantized products cannot be attributed with Transformer Engine's layers, whose "
            f"arithmetic cannot be taken apart (precision.recipe: {plan.recipe}, engine inputs {plan.engine_inputs}): "
            "train with run.attribute_every: 0, and attribute the run in an environment without transformer-engine"
        )


def check_gives_weights(url: str, info: Mapping[str, Any], folder: Path) -> None:
    """Check that an engine can return its weights.

    Args:
        url: URL of the engine.
        info: its report, from `EnginePool.info`.
        folder: the folder in which it would write them.

    Raises:
        ConfigError: it is not an embedded server, or it may not write there.
    """
    if info.get("engine") != "embedded":
        raise ConfigError(
            f"the mismatch cannot be attributed with the engine at {url}: it is not an embedded server and cannot give "
            "back the weights it holds; name servers of `megatron-rl serve` in rollout.urls, or set "
            "run.attribute_every: 0"
        )
    if not any(folder.absolute().is_relative_to(allowed) for allowed in info.get("save_dirs", ())):
        raise ConfigError(
            f"the mismatch cannot be attributed with the engine at {url}: it may not write its weights to "
            f"{folder.absolute()}; start it with --save-dir {folder.absolute()}, or set run.attribute_every: 0"
        )
