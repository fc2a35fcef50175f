"""What one rank on a GPU runs: a training step on Transformer Engine's layers, or on megatron-core's local ones."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.objectives import make_objective
from megatron_rl.policy.actor import Policy
from tests.parallel.steps import OBJECTIVE, make_batch, make_policy


def local_layers() -> None:
    """Make this process do without Transformer Engine, wherever the package has noted that it is there."""
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron_rl.") and hasattr(module, "HAVE_TE"):
            module.HAVE_TE = False  # type: ignore[attr-defined]


def layers_of(policy: Policy) -> str:
    """The class of the first layer's first linear: what really multiplies."""
    return type(policy.models[0].decoder.layers[0].self_attention.linear_qkv).__name__


def step(model: Path, transformer_engine: bool, precision: dict[str, Any]) -> dict[str, Any]:
    """One update: log-probabilities, loss, the gradients of every layer's matrices, and what multiplied."""
    if not transformer_engine:
        local_layers()
    policy = make_policy(model, {}, precision=precision)
    batch, objective = make_batch(), make_objective(OBJECTIVE)
    grads: dict[str, np.ndarray] = {}
    optimizer_step = policy.optimizer.step

    def noting_step(grad_norm: float) -> None:
        for name, parameter in policy.models[0].named_parameters():
            if (
                ".linear_" in name and parameter.dim() == 2
            ):  # vectors: Transformer Engine's norms lie inside its linears
                grads[name] = parameter.main_grad.float().cpu().numpy()
        optimizer_step(grad_norm)

    policy.optimizer.step = noting_step  # type: ignore[method-assign]
    stats = policy.update(batch, objective, objective.norm)
    return {
        "grads": grads,
        "logp": stats.logp,
        "loss": stats.loss,
        "metrics": stats.metrics,
        "layers": layers_of(policy),
        "trained": batch.mask > 0,
    }
