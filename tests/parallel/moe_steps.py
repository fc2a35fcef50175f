"""Functions that the ranks of a group run for mixture-of-experts models.

The common arguments are described in `tests.parallel.steps`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_rl.policy import model as policy_model
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.routing_replay import prepare_experts
from megatron_rl.types import Batch
from tests.parallel.alp_steps import alp_policy, named
from tests.parallel.steps import exported, make_batch, make_policy, noted_update, replicas_differ


def expert_replicas_differ(policy: Policy) -> float:
    """Return the largest difference of an expert between the ranks that hold a copy of it."""
    group, worst = parallel_state.get_expert_data_parallel_group(), 0.0
    for chunk in policy.models:
        for name, p in chunk.named_parameters():
            if ".experts." in name:
                low, high = p.data.clone(), p.data.clone()
                dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
                dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
                worst = max(worst, float((high - low).abs().max()))
    return worst


def shift_experts(policy: Policy) -> None:
    """Give every expert of this rank the weights of its neighbor, as a wrong offset would."""
    for chunk in policy.models:
        for layer in chunk.decoder.layers:
            experts = layer.mlp.experts.local_experts
            kept = [[p.data.clone() for p in expert.parameters()] for expert in experts]
            for expert, weights in zip(experts, kept[1:] + kept[:1], strict=True):
                for p, w in zip(expert.parameters(), weights, strict=True):
                    p.data.copy_(w)


def as_dense_parameters(chunk: Any) -> None:
    """Mark experts as dense parameters, as megatron-core does if one expert-parallel rank holds them all."""
    prepare_experts(chunk)
    for layer in chunk.decoder.layers:
        for p in layer.mlp.experts.parameters():
            p.allreduce = True


def step(model: Path, layout: dict[str, Any], sabotage: str | None = None, **sections: Any) -> dict[str, Any]:
    """Make the step of `steps.step`. sabotage: `shifted` experts, or experts marked as `dense` parameters."""
    if sabotage == "dense":
        policy_model.prepare_experts = as_dense_parameters
    try:
        policy = make_policy(model, layout, **sections)
    finally:
        policy_model.prepare_experts = prepare_experts
    if sabotage == "shifted":
        with torch.no_grad():
            shift_experts(policy)
    held = sum(len(layer.mlp.experts.local_experts) for chunk in policy.models for layer in chunk.decoder.layers)
    stats, grads = noted_update(policy, exported)
    return {
        "grads": grads,
        "weights": exported(policy),
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "logp": stats.logp,
        "entropy": stats.entropy,
        "replicas_differ": max(replicas_differ(policy), expert_replicas_differ(policy)),
        "held": held,
    }


def replay_batch(seed: int = 3, experts: int = 8, per_token: int = 2, layers: int = 4) -> Batch:
    """Return the usual batch with random experts. Some tokens, and the last one of each trajectory, have none.

    Args:
        seed: seed of the experts.
        experts: number of experts.
        per_token: number of experts per token.
        layers: number of layers.
    """
    batch, rng = make_batch(), np.random.default_rng(seed)
    routing = rng.random((len(batch.tokens), layers, experts)).argsort(-1)[..., :per_token].astype(np.int32)
    routing[rng.random(len(batch.tokens)) < 0.1] = -1
    routing[batch.cu_seqlens[1:] - 1] = -1
    return batch.with_columns(routing=routing)


def shift_rows(policy: Policy) -> None:
    """Give every token the experts of its neighbor in the stream."""
    rows = policy.routing.rows
    policy.routing.rows = lambda micro: rows(  # type: ignore[method-assign]
        replace(micro, columns={**micro.columns, "routing": micro.columns["routing"].roll(1, 0)})
    )


def replay_step(model: Path, layout: dict[str, Any], sabotage: str | None = None, **sections: Any) -> dict[str, Any]:
    """Make one update with replayed routing. Also return the log-probabilities before it. sabotage: `shifted` rows."""
    alp = "alp" in sections
    policy = (alp_policy if alp else make_policy)(model, layout, rollout={"routing_replay": True}, **sections)
    if sabotage == "shifted":
        shift_rows(policy)
    scored = policy.logprobs(replay_batch())
    stats, grads = noted_update(policy, named if alp else exported, replay_batch())
    return {
        "grads": grads,
        "weights": (named if alp else exported)(policy),
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "logp": stats.logp,
        "scored": scored,
        "entropy": stats.entropy,
        "replicas_differ": max(replicas_differ(policy), expert_replicas_differ(policy)),
        "metrics": stats.metrics,
    }


def chosen_experts(policy: Policy, batch: Batch) -> np.ndarray:
    """Return the experts that the routers of a policy on one rank use for every token, [N, L, K], sorted."""
    layers, per_token = policy.shape.num_layers, policy.shape.experts.per_token
    out = np.full((len(batch.tokens), layers, per_token), -1)
    micros, held, calls = [], policy.routing.rows, []
    policy.routing.rows = (  # type: ignore[method-assign]
        lambda micro: micros.append(micro) or held(micro)  # type: ignore[func-returns-value]
    )
    hooks = [
        layer.mlp.router.register_forward_hook(lambda router, args, made: calls.append(made[1]))
        for layer in policy.models[0].decoder.layers
    ]
    policy.logprobs(batch)
    for hook in hooks:
        hook.remove()
    del policy.routing.rows
    for at, routing_map in enumerate(calls):  # micro-batch after micro-batch, layer after layer
        micro = micros[at // layers]
        real = micro.ids >= 0
        chosen = routing_map[real].nonzero()[:, 1].view(-1, per_token).numpy()
        out[batch.cu_seqlens[micro.seq_ids[real]] + micro.positions[real].numpy(), at % layers] = chosen
    return out
