"""Functions that the ranks of a group run: one training step under a layout, and what must be equal on all ranks.

Common arguments of these functions and of the other `*_steps` modules:
    model: a Hugging Face folder.
    layout: the `parallel` section of the configuration.
    sections: other sections of the configuration.
    sabotage: name of an error that the function makes on purpose; None: no error.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_rl.config import Config, make_config
from megatron_rl.objectives import make_objective
from megatron_rl.policy import build, parallel
from megatron_rl.policy.actor import Policy, UpdateStats
from megatron_rl.policy.device_port import pick_device
from megatron_rl.types import Batch
from tests.policies import build_planned_policy

BUDGET = 192
LENGTHS = [50, 7, 33, 61, 121, 9, 160, 5, 3, 5, 2, 90, 11, 30, 31, 29, 35, 177]
OBJECTIVE = {"name": "drpo", "delta": 0.15, "norm": "seq_mean_token_mean"}
OPTIMIZER = {"lr": 1e-2, "weight_decay": 0.01, "eps": 1e-2, "grad_clip": 0.05, "tokens_per_microbatch": BUDGET}


def make_batch(vocab: int = 259) -> Batch:
    """Return trajectories with very different masks: dense, one token, one half, sparse, or none."""
    rng = np.random.default_rng(500)
    tokens, masks = [], []
    for i, n in enumerate(LENGTHS):
        mask = np.zeros(n, dtype=np.float32)
        kind = i % 5
        if kind == 0:
            mask[1:] = rng.random(n - 1) < 0.9
        elif kind == 1:
            mask[n // 2] = 1
        elif kind == 2:
            mask[n // 4 + 1 : 3 * n // 4] = 1
        elif kind == 3:
            mask[1:] = rng.random(n - 1) < 0.2
        tokens.append(rng.integers(0, vocab, n))
        masks.append(mask)
    total = sum(LENGTHS)
    mask = np.concatenate(masks)
    return Batch(
        ids=np.arange(len(LENGTHS)) + 1000,
        groups=np.arange(len(LENGTHS)) // 2,
        tokens=np.concatenate(tokens).astype(np.int32),
        cu_seqlens=np.concatenate([[0], np.cumsum(LENGTHS)]),
        mask=mask,
        rewards=np.zeros(len(LENGTHS), dtype=np.float32),
        advantages=rng.standard_normal(len(LENGTHS)).astype(np.float32),
        logmu=(rng.uniform(-7, -4, total) * mask).astype(np.float32),
    )


def make_config_of(model: Path, layout: dict[str, Any], **sections: Any) -> Config:
    """Return the configuration of `make_policy`."""
    optimizer, rollout = sections.pop("optimizer", {}), sections.pop("rollout", {})
    return make_config(
        {
            "model": {"path": str(model)},
            "parallel": layout,
            "optimizer": {**OPTIMIZER, **optimizer},
            "rollout": {"max_prompt_tokens": 100, "max_new_tokens": 92, "temperature": 0.7, **rollout},
            **sections,
        }
    )


def make_policy(model: Path, layout: dict[str, Any], **sections: Any) -> Policy:
    config = make_config_of(model, layout, **sections)
    device = pick_device(config.run.device)
    return build_planned_policy(config, parallel.initialize(config.parallel, device, seed=1))


def exported(policy: Policy, pick: Any = None) -> dict[str, np.ndarray]:
    """Return {Hugging Face name: array} on rank 0, of the weights or of what `pick` returns per parameter."""
    saved = [(p, p.data) for chunk in policy.models for p in chunk.parameters()]
    for p, data in saved if pick else []:
        p.data = pick(p).detach().clone().to(data.dtype)
    try:
        return {name: t.float().cpu().numpy().copy() for name, t in policy.export() if t is not None}
    finally:
        for p, data in saved:
            p.data = data


def replicas_differ(policy: Policy) -> float:
    """Return the largest difference of a replicated parameter between tensor-parallel ranks."""
    group, worst = parallel_state.get_tensor_model_parallel_group(), 0.0
    for chunk in policy.models:
        for p in chunk.parameters():
            if not getattr(p, "tensor_model_parallel", False):
                low, high = p.data.clone(), p.data.clone()
                dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
                dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
                worst = max(worst, float((high - low).abs().max()))
    return worst


def _divide_by_local_counts(policy: Policy) -> None:
    """Make each micro-batch divide by its own number of sequences, a common but wrong convention."""
    correct = policy._loss

    def local_mean(micro: Any, scores: Any, *, norm: Any, **more: Any) -> Any:
        own = len(micro.seq_ids[micro.mask > 0].unique())
        return correct(micro, scores, norm=replace(norm, sequences=max(1, own)), **more)

    policy._loss = local_mean  # type: ignore[method-assign]


def noted_update(
    policy: Policy,
    tensors: Callable[..., dict[str, np.ndarray]],
    batch: Batch | None = None,
    method: dict[str, Any] | None = None,
) -> tuple[UpdateStats, dict[str, np.ndarray]]:
    """Make one update of the batch, which only rank 0 has. Return its stats and, on rank 0, its gradients.

    An objective that needs `logold` gets that of the update's own pass.

    Args:
        policy: the policy.
        tensors: `exported`, or another function with its arguments and result.
        batch: the batch; None: `make_batch()`.
        method: options of the objective; None: `OBJECTIVE`.
    """
    objective = make_objective(method or OBJECTIVE)
    grads: dict[str, np.ndarray] = {}
    optimizer_step = policy.optimizer.step

    def noting_step(grad_norm: float) -> None:
        grads.update(tensors(policy, lambda p: p.main_grad))
        optimizer_step(grad_norm)

    policy.optimizer.step = noting_step  # type: ignore[method-assign]
    held = policy.mesh.keep_on_lead(lambda: batch or make_batch(), Batch.without_rows)
    own_logold = "logold" in objective.needs
    return policy.update(held, objective, objective.norm, own_logold=own_logold), grads


def overlapped_step(model: Path, layout: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """Make the update of `step` with gradients that are summed over replicas during backward, as on a GPU."""
    chosen, build.overlaps_gradients = build.overlaps_gradients, lambda *args, **keys: True
    try:
        return step(model, layout, **sections)
    finally:
        build.overlaps_gradients = chosen


def step(
    model: Path,
    layout: dict[str, Any],
    sabotage: str | None = None,
    method: dict[str, Any] | None = None,
    **sections: Any,
) -> dict[str, Any]:
    """Make one update. Return, on rank 0, gradients, norm, loss, log-probabilities and the weights after it."""
    policy = make_policy(model, layout, **sections)
    if sabotage == "local_mean":
        _divide_by_local_counts(policy)
    stats, grads = noted_update(policy, exported, method=method)
    weights = exported(policy)
    differ = replicas_differ(policy)
    return {
        "metrics": stats.metrics,
        "grads": grads,
        "weights": weights,
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "logp": stats.logp,
        "entropy": stats.entropy,
        "replicas_differ": differ,
    }
