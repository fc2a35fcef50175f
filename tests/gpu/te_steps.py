"""A training step of one rank on a GPU, with Transformer Engine's layers or with megatron-core's local layers."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.objectives import make_objective
from megatron_rl.policy.actor import Policy
from tests.parallel.steps import OBJECTIVE, make_batch, make_policy

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from gpu import host_syncs


def local_layers() -> None:
    """Turn Transformer Engine off in this process: set HAVE_TE to False in every loaded module of the package."""
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron_rl.") and hasattr(module, "HAVE_TE"):
            module.HAVE_TE = False  # type: ignore[attr-defined]


def layers_of(policy: Policy) -> str:
    """Return the class name of the first layer's first linear, which shows the implementation that multiplies."""
    return type(policy.models[0].decoder.layers[0].self_attention.linear_qkv).__name__


def step(model: Path, transformer_engine: bool, precision: dict[str, Any]) -> dict[str, Any]:
    """Run one update. Return logp, loss, metrics, gradients of all layer matrices, and the class that multiplied."""
    if not transformer_engine:
        local_layers()
    policy = make_policy(model, {}, precision=precision)
    batch, objective = make_batch(), make_objective(OBJECTIVE)
    grads: dict[str, np.ndarray] = {}
    optimizer_step = policy.optimizer.step

    def noting_step(grad_norm: float) -> None:
        for name, parameter in policy.models[0].named_parameters():
            # Vectors are skipped, because Transformer Engine's norms are inside its linears.
            if ".linear_" in name and parameter.dim() == 2:
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


def waits(model: Path, budget: int, precision: dict[str, Any]) -> dict[str, int]:
    """Return how often torch says that an update in micro-batches of `budget` tokens waits for the GPU, by line."""
    policy = make_policy(model, {}, precision=precision, optimizer={"tokens_per_microbatch": budget})
    batch, objective = make_batch(), make_objective(OBJECTIVE)
    policy.update(batch, objective, objective.norm)  # the first one also loads kernels
    return dict(host_syncs(lambda: policy.update(batch, objective, objective.norm)))
