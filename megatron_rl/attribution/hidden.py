"""Hidden states layer by layer: those of the trainer and those of transformers with the engine's weights."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megatron_rl.errors import ConfigError
from megatron_rl.policy.actor import Policy
from megatron_rl.precision.plan import DTYPES, PrecisionPlan
from megatron_rl.types import Batch


def check_one_rank(world: int) -> None:
    """Raise ConfigError if the run has several ranks, because hidden states are complete only on a single rank."""
    if world > 1:
        raise ConfigError(
            f"hidden states are compared on one rank, and the run has {world}: set parallel to 1 in a copy of its "
            "configuration, or attribute without --layers, which works under every layout"
        )


def rounding_floor(plan: PrecisionPlan) -> float:
    """Return the relative error that rounding to the trainer's dtype leaves at every layer, with a margin."""
    return 4 * torch.finfo(DTYPES[plan.train]).eps


@torch.no_grad()
def hidden_errors(policy: Policy, batch: Batch, held: Path) -> list[float]:
    """Return the relative error of the outputs of each layer, on the batch's longest trajectory.

    The error is |theirs - ours| / |ours|, with Frobenius norms over tokens. `ours` is the policy with its present
    parameters. `theirs` is transformers in float32 with the weights in `held`.

    Args:
        policy: the trainer's policy, on one rank.
        batch: the trajectories.
        held: model folder of the engine's weights.
    """
    row = int(np.argmax(batch.lengths))
    one, length = batch.select(np.array([row])), int(batch.lengths[row])
    ours: list[Tensor] = []
    hooks = _collect(policy.models[0].decoder.layers, lambda output: output[0][:length, 0], ours)
    try:
        policy.logprobs(one)  # one trajectory is one micro-batch, and its first sequence
    finally:
        for hook in hooks:
            hook.remove()
    model: Any = AutoModelForCausalLM.from_pretrained(held, dtype=torch.float32).to(policy.mesh.device).eval()
    theirs: list[Tensor] = []
    _collect(model.model.layers, lambda output: (output[0] if isinstance(output, tuple) else output)[0], theirs)
    model(torch.from_numpy(one.tokens.astype(np.int64))[None].to(policy.mesh.device))
    return [float(torch.linalg.norm(b - a) / torch.linalg.norm(a)) for a, b in zip(ours, theirs, strict=True)]


def _collect(layers: Any, state_TH: Any, into: list[Tensor]) -> list[Any]:
    def keep(_: nn.Module, __: Any, output: Any) -> None:
        into.append(state_TH(output).float())

    return [layer.register_forward_hook(keep) for layer in layers]
