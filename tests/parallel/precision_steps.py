"""Functions that the ranks of a group run to make updates with quantized products under a layout.

The common arguments are described in `tests.parallel.steps`.
"""

from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from megatron_rl.policy.actor import Policy
from megatron_rl.policy.checkpoint import Checkpoints
from megatron_rl.policy.checkpoint_state import TrainState
from megatron_rl.precision.linear import QuantizedLinear, linears
from megatron_rl.types import Batch
from tests.parallel.checkpoint_steps import update
from tests.parallel.steps import exported, make_batch, make_policy, noted_update, replicas_differ


def quantized_linears(policy: Policy) -> list[tuple[int, str]]:
    """Return (global layer, kind) of every quantized linear of all stages, on rank 0."""
    own = [
        (layer, kind)
        for chunk in policy.models
        for layer, kind, linear in linears(chunk.decoder)
        if isinstance(linear, QuantizedLinear)
    ]
    return sorted({one for part in policy.mesh.gather(own) for one in part})


# Trajectories of the common batch with few tokens, and masks of every kind.
SHORT = (1, 2, 5, 7, 10, 12, 13)


def short_batches() -> list[Batch]:
    """Return batches of one short trajectory each."""
    return [make_batch().select(np.array([row])) for row in SHORT]


def short_steps(model: Path, layout: dict[str, Any], **sections: Any) -> list[dict[str, Any]]:
    """Return the result of `step` for each of the short batches, each with a new policy."""
    return [step(model, layout, batch=batch, **sections) for batch in short_batches()]


def short_delayed_runs(model: Path, layout: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the result of `delayed_run` for each of the short batches, each with a new policy."""
    return [delayed_run(model, layout, batch) for batch in short_batches()]


def step(
    model: Path,
    layout: dict[str, Any],
    updates: int = 1,
    sabotage: str | None = None,
    batch: Batch | None = None,
    **sections: Any,
) -> dict[str, Any]:
    """Make `updates` updates with `batch`, or the common one.

    Return the result of `steps.step` for the last one, and what was quantized.

    sabotage: `plain_on_last_rank` leaves one linear of the last rank unquantized.
    """
    policy = make_policy(model, layout, **sections)
    if sabotage == "plain_on_last_rank" and policy.mesh.rank == policy.mesh.world - 1:
        linear = policy.models[0].decoder.layers[1].mlp.linear_fc1
        linear.__class__ = ColumnParallelLinear  # only its products change: they are megatron-core's own
    for _ in range(updates):
        stats, grads = noted_update(policy, exported, batch)
    return {
        "grads": grads,
        "weights": exported(policy),
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "logp": stats.logp,
        "metrics": stats.metrics,
        "replicas_differ": replicas_differ(policy),
        "quantized": quantized_linears(policy),
        "core_fp8": policy.tf_config.fp8,
        "dtype": policy.models[0].decoder.layers[0].mlp.linear_fc1.weight.dtype,
    }


def delayed_scales(policy: Policy) -> dict[str, float]:
    """Return {`layer kind operand`: scale} of this rank's linears."""
    return {
        f"{layer} {kind} {operand}": float(getattr(linear.scales, operand).scale)
        for chunk in policy.models
        for layer, kind, linear in linears(chunk.decoder)
        for operand in ("inputs", "weights", "gradients")
    }


def delayed_run(model: Path, layout: dict[str, Any], batch: Batch | None = None) -> dict[str, Any]:
    """Return this rank's delayed scales after an update, and after the new weights have scored a batch."""
    policy = make_policy(model, layout, precision={"recipe": "delayed"})
    update(policy, batch)
    scales = delayed_scales(policy)
    policy.logprobs(batch or make_batch())
    return {"scales": scales, "scored": delayed_scales(policy)}


def save_and_go_on(model: Path, layout: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make two updates with delayed scaling, save a checkpoint, and make a third update."""
    policy = make_policy(model, layout, precision={"recipe": "delayed"})
    for _ in range(2):
        update(policy)
    checkpoints = Checkpoints(folder, policy, keep=2)
    checkpoints.save(TrainState(step=2, updates=policy.optimizer.updates), wait=True)
    checkpoints.close()
    scales = delayed_scales(policy)
    update(policy)
    return {"scales": scales, "next": exported(policy)}


def load_and_go_on(model: Path, layout: dict[str, Any], folder: Path, forget: bool = False) -> dict[str, Any]:
    """Load that checkpoint into a new policy, with `forget` without its scales, and make the next update."""
    policy = make_policy(model, layout, precision={"recipe": "delayed"})
    checkpoints = Checkpoints(folder, policy, keep=2)
    fresh = [
        (linear.scales, linear.scales.state_dict())
        for chunk in policy.models
        for _, _, linear in linears(chunk.decoder)
    ]
    checkpoints.load_newest()
    checkpoints.close()
    for scales, state in fresh if forget else []:
        scales.load_state_dict(state)
    scales_now = delayed_scales(policy)
    update(policy)
    return {"scales": scales_now, "next": exported(policy)}
