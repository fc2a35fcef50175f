"""Runs megatron-core's pipeline schedule over a batch: packing, noise, and the scores of whole micro-batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_rl.alp.layer import NoiseDraw
from megatron_rl.policy.device_copy import on_device
from megatron_rl.policy.packing import Microbatch, Shard, noise_rows, pack, shard, stream_unit
from megatron_rl.policy.parallel import Mesh
from megatron_rl.policy.routing_replay import RoutingReplay
from megatron_rl.policy.shares import Share, make_shares
from megatron_rl.types import Batch


@dataclass(frozen=True)
class Scores:
    """The model's scores of a whole packed micro-batch of T tokens.

    Attributes:
        logp: [T] fp32, log-probability of each token; differentiable.
        entropy: [T] fp32, entropy of the distribution at each token; differentiable.
        topk: [T, K] fp32 log-probabilities of the engine's most likely tokens; differentiable; None when not needed.
    """

    logp: torch.Tensor
    entropy: torch.Tensor
    topk: torch.Tensor | None = None


Loss = Callable[[Microbatch, Scores], tuple[torch.Tensor, dict[str, Any]]]


@dataclass(frozen=True)
class NoiseSource:
    """The parameters of the noise of one update.

    Attributes:
        seed: seed of the run.
        draw: number of the update.
        sharded: the layers' inputs are sharded over the tensor-parallel group by sequence parallelism.
    """

    seed: int
    draw: int
    sharded: bool


class Schedule:
    """One pass over a batch, in micro-batches, on every rank of the layout."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        mesh: Mesh,
        routing: RoutingReplay,
        tokens_per_microbatch: int,
        *,
        boundaries: bool,
        split: bool,
    ) -> None:
        """Set the model and its layout.

        Args:
            chunks: this rank's pipeline chunks, wrapped for data parallelism.
            mesh: the parallel layout.
            routing: replays the engine's choice of experts.
            tokens_per_microbatch: token budget of a packed micro-batch.
            boundaries: the layers read the boundaries of sequences.
            split: streams are split for replicas and pipeline stages. With quantized products they must not be:
                scales and blocks span the tokens of a stream, and results would depend on the layout.
        """
        self.boundaries, self.split = boundaries, split
        self.chunks, self.mesh, self.routing, self.budget = list(chunks), mesh, routing, tokens_per_microbatch

    def run(
        self, batch: Batch, loss: Loss, *, forward_only: bool = False, noise: NoiseSource | None = None
    ) -> list[dict[str, Any]]:
        """Run forward, and backward unless `forward_only`. Collective.

        Args:
            batch: the whole batch; that of rank 0 is read, and each replica is sent its share.
            loss: function of a micro-batch and its scores that returns the loss and a report.
            forward_only: compute no gradient.
            noise: perturbs every layer; None for no noise.

        Returns:
            The report of each of this rank's micro-batches, from the last pipeline stage.
        """
        self.routing.reset()
        share = self.mesh.scatter(lambda: self._shares(batch))
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        pairs = [self._moved(micro, self._shard(micro, noise), last) for micro in pack(share)]
        virtual = len(self.chunks) > 1

        def forward_step(
            feed: Iterator[tuple[Microbatch, Shard]], chunk: torch.nn.Module
        ) -> tuple[Any, Callable[..., Any]]:
            micro, piece = next(feed)
            return chunk(piece), lambda scores: self._score(micro, piece, scores, loss)

        feeds = [iter(pairs) for _ in self.chunks]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=feeds if virtual else feeds[0],
            model=self.chunks if virtual else self.chunks[0],
            num_microbatches=len(pairs),
            seq_length=share.length,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _shares(self, batch: Batch) -> list[Share]:
        """Return the share of each data-parallel replica. Raise UserError if the model cannot compute the batch."""
        mesh = self.mesh
        self.routing.check(batch)
        return make_shares(
            batch,
            replicas=mesh.dp_size,
            budget=self.budget,
            align=2 * mesh.cp_size if mesh.cp_size > 1 else 1,
            multiple=mesh.pp_size if self.split or len(self.chunks) > 1 else 1,
            split=self.split,
            unit=stream_unit(self.budget, mesh.tp_size, mesh.cp_size, mesh.device.type),
        )

    def _moved(self, micro: Microbatch, piece: Shard, scored: bool) -> tuple[Microbatch, Shard]:
        """Copy a shard to the device, and its micro-batch if the loss is computed on this rank."""
        device = self.mesh.device
        return on_device((micro, piece), device) if scored else (micro, on_device(piece, device))

    def _shard(self, micro: Microbatch, noise: NoiseSource | None) -> Shard:
        """Return the rows of a micro-batch that this rank computes, with their noise and their experts, on the host."""
        mesh = self.mesh
        piece = shard(
            micro,
            cp_size=mesh.cp_size,
            cp_rank=mesh.cp_rank,
            max_length=self.budget + 1,
            boundaries=self.boundaries,
        )
        piece.stream.noise = None if noise is None else self._noise(micro, noise)
        piece.stream.routing = self.routing.rows(micro)
        return piece

    def _noise(self, micro: Microbatch, noise: NoiseSource) -> NoiseDraw:
        mesh = self.mesh
        rows = noise_rows(
            micro,
            cp_size=mesh.cp_size,
            cp_rank=mesh.cp_rank,
            sp_size=mesh.tp_size if noise.sharded else 1,
            sp_rank=mesh.tp_rank if noise.sharded else 0,
        )
        return NoiseDraw(rows, noise.seed, noise.draw)

    def _score(
        self, micro: Microbatch, piece: Shard, scores: tuple[torch.Tensor, ...], loss: Loss
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Put the scores of this rank's rows into the whole stream, then compute the loss.

        Under context parallelism every rank has all log-probabilities of the stream and computes the same loss. Those
        of other ranks are constants. Each rank sends gradients only through its own rows, and these add up to the
        gradient. So an objective may read whole sequences and is independent of the layout.
        """
        value, report = loss(micro, Scores(*(self._whole_stream(micro, piece, score) for score in scores)))
        return value, torch.zeros((), dtype=torch.int, device=value.device), report

    def _whole_stream(self, micro: Microbatch, piece: Shard, score_R: torch.Tensor) -> torch.Tensor:
        stream_T = score_R.new_zeros(len(micro.tokens), *score_R.shape[1:])
        if self.mesh.cp_size > 1:
            local = torch.zeros_like(stream_T)
            local[piece.index] = score_R.detach()
            dist.all_reduce(local, group=parallel_state.get_context_parallel_group())
            stream_T = local
        return stream_T.index_put((piece.index,), score_R)
