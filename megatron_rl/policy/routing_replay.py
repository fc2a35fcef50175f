"""Rollout routing replay (R3): the trainer routes a token to the experts the engine chose for it.

Only the choice I is replayed. The gates come from the trainer's own scores s: g_i = e^{s_i} / sum_{j in I} e^{s_j} where the
model normalizes over the chosen, else the softmax over all experts at i; gradients flow through s as for a free choice.

The choice travels with the tokens, in the PackedStream of their micro-batch, and a layer takes its own part of it when it is
called. So pipeline stages, interleaved micro-batches and recomputation each find the rows of the tokens they compute.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe import moe_utils
from torch import Tensor, nn

from megatron_rl.config import Config
from megatron_rl.errors import UserError
from megatron_rl.policy.packing import Microbatch, held_rows
from megatron_rl.policy.parallel import Mesh
from megatron_rl.types import Batch
from megatron_rl.weights.families.family import ModelShape


class Replay:
    """What a router asks for the experts of its tokens: megatron-core's seam for a `router_replay`.

    counts: how often experts were given, and how often the router would have chosen the same set, since somebody cleared
    them; a tensor on the device, None for never. Only where gradients are made: once per token, recomputed or not.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.counts: Tensor | None = None

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        choose: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """scores [t, E] -> (scores of the chosen, their indices), both [t, K]; rows of -1 are chosen freely."""
        values, free = choose(scores, topk, num_groups, group_topk)
        if self.rows is None:
            return values, free
        given = self.rows[:, :1] >= 0
        chosen = torch.where(given, self.rows, free)
        if torch.is_grad_enabled():
            same = (chosen.sort(-1).values == free.sort(-1).values).all(-1) & given[:, 0]
            counts = torch.stack([given.sum(), same.sum()])
            self.counts = counts if self.counts is None else self.counts + counts
        return scores.gather(1, chosen), chosen


class RoutingReplay:
    """The replayed choices of a policy: checks what is to be replayed, hands it to the layers, and tells what became of it."""

    def __init__(self, config: Config, shape: ModelShape, models: Sequence[nn.Module], mesh: Mesh) -> None:
        self.wanted, self.sequence = config.rollout.routing_replay, config.parallel.sequence
        self.shape, self.mesh = shape, mesh
        self.replays: list[Replay] = [
            layer.mlp.router.router_replay for m in models for layer in _layers_with_experts(m)
        ]

    def start(self, batch: Batch) -> None:
        """Forget what ran so far. Raises UserError, on all ranks alike, for a choice that this model cannot replay."""
        for replay in self.replays:
            replay.counts = None
        wrong = self._what_is_wrong(batch)
        if wrong is not None:
            self.mesh.raise_everywhere(UserError(f"{wrong}: the batch is refused"))

    def _what_is_wrong(self, batch: Batch) -> str | None:
        experts, routing = self.shape.experts, batch.routing
        if routing is None:
            return (
                "rollout.routing_replay is true, and the trajectories carry no routed experts" if self.wanted else None
            )
        if experts is None:
            return f"trajectories carry routed experts, and the model has none: batch.routing is {list(routing.shape)}"
        expected = (len(batch.tokens), self.shape.num_layers, experts.per_token)
        if routing.shape != expected:
            return f"batch.routing has shape {list(routing.shape)}, {list(expected)} is needed"
        if routing.size and not (routing.min() >= -1 and routing.max() < experts.count):
            return f"batch.routing names experts outside [0, {experts.count}), -1 aside"
        ordered = np.sort(routing, axis=-1)
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        partly = (ordered[..., 0] < 0) & (ordered[..., -1] >= 0)
        if twice.any() or partly.any():
            return "batch.routing names an expert twice for one token, or fewer experts than the model routes to"
        return None

    def rows(self, micro: Microbatch) -> Tensor | None:
        """[t, L, K] int64 of the tokens whose hidden states this rank holds, on its device; None when nothing is replayed."""
        if micro.routing is None:
            return None
        mesh, cut = self.mesh, self.sequence
        own = held_rows(
            micro,
            cp_size=mesh.cp_size,
            cp_rank=mesh.cp_rank,
            sp_size=mesh.tp_size if cut else 1,
            sp_rank=mesh.tp_rank if cut else 0,
        )
        return micro.routing[own].to(mesh.device, torch.int64)

    def record(self, batch: Batch) -> dict[str, float]:
        """Since `start`, on rank 0 (elsewhere empty): the share of (token, layer) pairs of the batch that were replayed, and of
        those the share for which the trainer's router would have chosen the same set. Collective; empty without replay.
        """
        if batch.routing is None:
            return {}
        counts = [replay.counts for replay in self.replays if replay.counts is not None]
        own = torch.stack(counts).sum(0).tolist() if counts else [0, 0]
        parts = self.mesh.gather(own)
        if not parts:
            return {}
        replayed, agreed = (sum(column) for column in zip(*parts, strict=True))
        share = {"routing/replayed": replayed / (len(batch.tokens) * self.shape.num_layers)}
        return share | ({"routing/agreement": agreed / replayed} if replayed else {})


def prepare_experts(model: nn.Module) -> None:
    """Make the layers of a chunk that have experts replay a choice that comes with their tokens. Nothing for a dense model.

    Also marks experts as such where one expert-parallel rank holds them all: megatron-core would take them for dense
    parameters, and under tensor parallelizm not add up what ranks learnt from different tokens.
    """
    if not hasattr(
        moe_utils, "te_general_gemm"
    ):  # 0.16.1 asks for it by name, and lacks the name without Transformer Engine
        moe_utils.te_general_gemm = None
    for layer in _layers_with_experts(model):
        layer.mlp.router.router_replay = Replay()
        layer.register_forward_pre_hook(_take_rows, with_kwargs=True)
        layer.mlp.register_forward_hook(_forget_probs)
        for parameter in layer.mlp.experts.parameters():
            parameter.allreduce = False


def _take_rows(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
    routing: Tensor | None = getattr(kwargs.get("packed_seq_params"), "routing", None)
    layer.mlp.router.router_replay.rows = None if routing is None else routing[:, layer.layer_number - 1]


def _forget_probs(experts: Any, args: Any, output: Any) -> None:
    """The dispatcher would keep the step's graph, which holds the model, its process groups and their threads for good."""
    experts.token_dispatcher.probs = None


def _layers_with_experts(model: Any) -> Iterator[Any]:
    for layer in model.decoder.layers:
        if hasattr(layer.mlp, "router"):
            yield layer
