"""Rollout routing replay (R3): the trainer routes a token to the experts that the engine chose for it.

Only the choice I is replayed. The gates come from the trainer's own scores s: g_i = e^{s_i} / sum_{j in I} e^{s_j} if
the model normalizes over the chosen experts, else the softmax over all experts at i. Gradients flow through s as for a
free choice.

The choice is passed with the tokens, in the PackedStream of their micro-batch. A layer takes its own part when it is
called. So pipeline stages, interleaved micro-batches and recomputation all use the rows of the tokens they compute.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe import moe_utils
from torch import Tensor, nn

from megatron_rl.config import Config
from megatron_rl.errors import UserError
from megatron_rl.policy.packing import Microbatch, local_positions
from megatron_rl.policy.parallel import Mesh
from megatron_rl.types import Batch
from megatron_rl.weights.families import ModelShape


class RouterReplay:
    """The `router_replay` object of one megatron-core router, which gets the experts of its tokens from it.

    Attributes:
        rows: experts of the tokens in the present call, shape [t, K], -1 where the router chooses. None: no replay.
        counts: two counts since the last reset, a tensor on the device: tokens whose experts were given, and those of
            them for which the router would have chosen the same set. None: nothing was counted. A call counts only if
            gradients are enabled, so a token counts once, with or without recomputation.
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
        """Return the scores of the chosen experts and their indices, both [t, K].

        Args:
            scores: the router's scores, shape [t, E].
            topk: number of experts per token, K.
            num_groups: passed to `choose`.
            group_topk: passed to `choose`.
            choose: the router's free choice, used where `rows` is -1.
        """
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
    """Replayed routing of a policy: it checks the given experts, selects this rank's rows and counts agreement.

    Args:
        config: configuration of the run.
        shape: shape of the model.
        models: this rank's model chunks.
        mesh: this rank's position in the parallel layout.
    """

    def __init__(self, config: Config, shape: ModelShape, models: Sequence[nn.Module], mesh: Mesh) -> None:
        self.wanted, self.sequence = config.rollout.routing_replay, config.parallel.sequence
        self.shape, self.mesh = shape, mesh
        self.replays: list[RouterReplay] = [
            layer.mlp.router.router_replay for m in models for layer in _layers_with_experts(m)
        ]

    def reset(self) -> None:
        """Reset the counts."""
        for replay in self.replays:
            replay.counts = None

    def check(self, batch: Batch) -> None:
        """Raise UserError if this model cannot replay the experts of the whole batch. For rank 0."""
        wrong = self._what_is_wrong(batch)
        if wrong is not None:
            raise UserError(f"{wrong}: the batch is refused")

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
        """Return the experts of the tokens whose hidden states this rank holds: [t, L, K] int64, on the host.

        Return None if nothing is replayed.
        """
        routing = micro.columns.get("routing")
        if routing is None:
            return None
        mesh, cut = self.mesh, self.sequence
        own = local_positions(
            micro,
            cp_size=mesh.cp_size,
            cp_rank=mesh.cp_rank,
            sp_size=mesh.tp_size if cut else 1,
            sp_rank=mesh.tp_rank if cut else 0,
        )
        return routing[own].long()

    def record(self, batch: Batch) -> dict[str, float]:
        """Return the statistics of replay since `reset`, on rank 0 (elsewhere empty). Collective; empty without replay.

        `routing/replayed` is the share of (token, layer) pairs of the batch that were replayed. `routing/agreement` is
        the share of these pairs for which the trainer's router would have chosen the same set.
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
    """Make the expert layers of a chunk replay the choice that comes with their tokens. Do nothing for a dense model.

    Also mark the experts as experts if one expert-parallel rank holds them all. megatron-core would treat them as dense
    parameters. Under tensor parallelism it would then not sum the gradients that ranks compute from different tokens.
    """
    # megatron-core 0.16.1 uses this name, but does not define it without Transformer Engine.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    for layer in _layers_with_experts(model):
        layer.mlp.router.router_replay = RouterReplay()
        layer.register_forward_pre_hook(_take_rows, with_kwargs=True)
        layer.mlp.register_forward_hook(_forget_probs)
        for parameter in layer.mlp.experts.parameters():
            parameter.allreduce = False
            # megatron-core marks the biases of experts as if every tensor-parallel rank had the same experts.
            parameter.sequence_parallel = False
            # The norm of the gradients counts other parameters on the first tensor-parallel rank alone. Then ranks
            # would clip the gradients by different norms. The weights of experts have this mark already.
            parameter.tensor_model_parallel = True


def weight_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers of a chunk that hold weights of the model, by name: the correction biases of routers."""
    for name, buffer in model.named_buffers():
        if name.endswith(".expert_bias"):
            yield name, buffer


def _take_rows(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
    routing: Tensor | None = getattr(kwargs.get("packed_seq_params"), "routing", None)
    layer.mlp.router.router_replay.rows = None if routing is None else routing[:, layer.layer_number - 1]


def _forget_probs(experts: Any, args: Any, output: Any) -> None:
    """Clear the dispatcher's `probs`.

    They hold the step's graph, which holds the model, its process groups and their threads forever.
    """
    experts.token_dispatcher.probs = None


def _layers_with_experts(model: Any) -> Iterator[Any]:
    for layer in model.decoder.layers:
        if hasattr(layer.mlp, "router"):
            yield layer
