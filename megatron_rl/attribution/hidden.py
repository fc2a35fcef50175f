"""Hidden states layer by layer: the trainer's against those of transformers on the weights that an engine holds."""

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
    """Hidden states are whole on one rank alone."""
    if world > 1:
        raise ConfigError(
            f"hidden states are compared on one rank, and the run has {world}: set parallel to 1 in a copy of its "
            "configuration, or attribute without --layers, which works under every layout"
        )


def rounding_floor(plan: PrecisionPlan) -> float:
    """The relative error that rounding to the trainer's dtype leaves at every layer, with room."""
    return 4 * torch.finfo(DTYPES[plan.train]).eps


@torch.no_grad()
def hidden_errors(policy: Policy, batch: Batch, held: Path) -> list[float]:
    """|theirs - ours| / |ours| (Frobenius norms over tokens) of the outputs of each layer, on the batch's longest trajectory.

    ours: of the policy with the parameters it has now; theirs: of transformers in float32 with the weights in `held`.
    """
    row = int(np.argmax(batch.lengths))
    one, length = batch.select(np.array([row])), int(batch.lengths[row])
    ours: list[Tensor] = []
    hooks = _collect(policy.models[0].decoder.layers, lambda output: output[0][:length, 0], ours)
    try:
        policy.logprobs(one)  # one trajectory is one micro-batch, of which it is the first sequence
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
