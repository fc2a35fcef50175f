"""The policy: a model under any parallel layout, asked for log-probabilities and for updates."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from megatron_rl.alp.layer import Draw
from megatron_rl.alp.sigma import sigma_holders
from megatron_rl.config import Config
from megatron_rl.errors import CheckpointError, PrecisionError, UserError
from megatron_rl.objectives import LossInputs, LossNorm, LossOutputs
from megatron_rl.policy.loss_denominator import global_norm, sum_gradients
from megatron_rl.policy.model import beyond_range, build_chunks
from megatron_rl.policy.modules import HAVE_TE
from megatron_rl.policy.optimizer import Gradients, PolicyOptimizer
from megatron_rl.policy.packing import Microbatch, Shard, noise_rows, pack, shard, to_device
from megatron_rl.policy.parallel import Mesh
from megatron_rl.policy.quantized_products import ProductMonitor
from megatron_rl.policy.routing_replay import RoutingReplay
from megatron_rl.precision.plan import DTYPES, PrecisionPlan, resolve
from megatron_rl.types import Batch
from megatron_rl.weights.export import export_weights
from megatron_rl.weights.hf_folder import HFFolder, write_hf_folder
from megatron_rl.weights.load import load_weights
from megatron_rl.weights.name_table import check_folder
from megatron_rl.weights.quantized import WireTensors, export_dtypes

Objective = Callable[[LossInputs], LossOutputs]


@dataclass(frozen=True)
class UpdateStats:
    """What one optimizer update did. On rank 0; elsewhere only `grad_norm` and `lr` are filled.

    logp, entropy [N] float32: per token of the batch (0 where nothing was trained), under the weights before the update.
    """

    grad_norm: float
    lr: float
    loss: float = float("nan")
    metrics: dict[str, float] | None = None
    logp: np.ndarray | None = None
    entropy: np.ndarray | None = None


@dataclass(frozen=True)
class Scores:
    """What the model says of a whole stream: logp, entropy [T] fp32, differentiable; topk [T, K] constants, or None."""

    logp: torch.Tensor
    entropy: torch.Tensor
    topk: torch.Tensor | None = None


class Policy:
    """One actor. Every method is collective: all ranks call it with equal arguments."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.source = HFFolder(config.model.path)
        self.family, self.shape = check_folder(
            self.source, tensor_parallel=mesh.tp_size, expert_parallel=config.parallel.expert
        )
        models = build_chunks(config, self.shape, mesh)
        load_weights(models, self.source, self.family, self.shape, tp_rank=mesh.tp_rank, tp_size=mesh.tp_size)
        self.products = ProductMonitor(resolve(config.precision, self.shape.num_layers), models, mesh, HAVE_TE)
        self.routing = RoutingReplay(config, self.shape, models, mesh)
        self.tf_config = models[0].config
        dtype = DTYPES[config.precision.train]
        mesh.raise_everywhere(mesh.broadcast(next(filter(None, mesh.gather(beyond_range(models, config))), None)))
        wrapped: list[Any] = (
            list(models) if dtype == torch.float32 else [Float16Module(self.tf_config, m) for m in models]
        )
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=config.optimizer.distributed,
            average_in_collective=False,
        )
        self.models = models
        self.chunks = [
            DistributedDataParallel(self.tf_config, ddp, chunk, disable_bucketing=i > 0)
            for i, chunk in enumerate(wrapped)
        ]
        self.optimizer = PolicyOptimizer(config.optimizer, config.alp, self.chunks, dtype)
        self.tf_config.grad_scale_func = self.optimizer.core.scale_loss
        self.tf_config.finalize_model_grads_func = sum_gradients
        self._reference: list[torch.Tensor] | None = None

    def update(self, batch: Batch, objective: Objective, norm: LossNorm) -> UpdateStats:
        """One optimizer update on the whole batch. With ALP its forward alone is perturbed, anew in every update.

        Raises PrecisionError naming trajectory ids when a loss, log-probability or gradient is not finite, UserError for
        a column that is not; parameters, optimizer state and delayed scales are then what they were.
        """
        try:
            batch.check_finite()
        except UserError as error:  # every rank holds the same batch
            self.mesh.raise_everywhere(error)
        whole = global_norm(norm, batch, self.config.rollout.max_new_tokens)
        scales = [scale.clone() for scale in self.products.scale_tensors()]
        try:
            (results, computed), gradients = self.optimizer.fill(
                lambda: self._differentiate(batch, objective, whole, scales)
            )
        except PrecisionError:
            self._put_scales(scales)
            raise
        lr = self.optimizer.lr
        self.optimizer.step(gradients.norm)
        stats = self._stats(batch, results, gradients, lr)
        return stats if stats.metrics is None else replace(stats, metrics=stats.metrics | computed)

    def _differentiate(
        self, batch: Batch, objective: Objective, norm: LossNorm, scales: list[torch.Tensor]
    ) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Forward and backward of the whole batch into empty gradients: reports of micro-batches, and how they were computed.

        scales: the delayed scales to begin with. Every call with the same weights and scales does the same.
        """
        self._put_scales(scales)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.products.start()
        draw = self.optimizer.updates if self.config.alp.enabled else None
        results = self._run(batch, lambda micro, scores: self._loss(micro, scores, objective, norm), draw=draw)
        self._refuse_non_finite(batch, results)
        return results, self.products.record() | self.routing.record(batch)

    def _put_scales(self, scales: list[torch.Tensor]) -> None:
        for mine, kept in zip(self.products.scale_tensors(), scales, strict=True):
            mine.copy_(kept)

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> np.ndarray:
        """[N] float32 log-probabilities of every trained token of the batch (0 elsewhere), on every rank."""

        def keep(micro: Microbatch, scores: Scores) -> tuple[torch.Tensor, dict[str, Any]]:
            logp = scores.logp
            return logp.sum(), {"source": micro.source, "mask": micro.mask, "logp": logp, "loss": logp.new_zeros(())}

        results = self._run(replace(batch, topk_ids=None, topk_logmu=None), keep, forward_only=True)
        self._refuse_non_finite(batch, results)
        return self.mesh.broadcast(self._collect(batch, results, ("logp",)).get("logp"))

    @torch.no_grad()
    def keep_reference(self) -> None:
        """Make the present weights the reference policy: `copy_weights`, with its errors.

        To be called before a checkpoint is restored, so that a resumed run measures against the same model as before.
        """
        self._reference = self.copy_weights()

    @torch.no_grad()
    def copy_weights(self) -> list[torch.Tensor]:
        """A copy of this rank's parameters, and of its delayed scales, without which they score otherwise; in host memory.

        Raises PrecisionError where those scales cannot be had.
        """
        if self.products.unreachable_scales:
            self.mesh.raise_everywhere(
                PrecisionError(
                    "precision.recipe is delayed, and Transformer Engine keeps the scales of its layers to itself: earlier "
                    "weights (a reference, a teacher, an attribution) would be scored with present scales; set "
                    "precision.recipe: tensorwise or blockwise, or an objective that needs no reference"
                )
            )
        return [tensor.to("cpu", copy=True) for tensor in self._weights()]

    @torch.no_grad()
    def put_weights(self, copied: list[torch.Tensor]) -> None:
        """Make the parameters and delayed scales what `copy_weights` returned. The optimizer keeps its masters: before a
        step, the own are due."""
        for mine, other in zip(self._weights(), copied, strict=True):
            mine.copy_(other)

    def reference_logprobs(self, batch: Batch) -> np.ndarray:
        """[N] float32: `logprobs` under the reference policy. The policy's own weights are back afterwards, bit by bit,
        also when an error is raised. Raises UserError when no reference is kept.
        """
        with self._as_reference():
            return self.logprobs(batch)

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        if self._reference is None:
            raise UserError("no reference policy is kept: call Policy.keep_reference() once the model folder is loaded")
        self._swap(self._reference)
        try:
            yield
        finally:
            self._swap(self._reference)

    @torch.no_grad()
    def _swap(self, kept: list[torch.Tensor]) -> None:
        """Exchange weights and copies in place: views into the optimizer's buffers stay views, and no third copy exists."""
        for mine, other in zip(self._weights(), kept, strict=True):
            present = mine.to("cpu", copy=True)
            mine.copy_(other)
            other.copy_(present)

    def _weights(self) -> Iterator[torch.Tensor]:
        """All that scores depend on, as it is held: parameters, then delayed scales."""
        for model in self.models:
            yield from (parameter.data for parameter in model.parameters())
        yield from self.products.scale_tensors()

    def export(
        self, plan: PrecisionPlan | None = None, *, dequantized: bool = False
    ) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Hugging Face names and tensors in table order, on rank 0 (None elsewhere): in the source's dtypes, or as `plan` has
        them travel; `dequantized` then as in `WireTensors`.
        """
        dtypes = self.source.dtypes if plan is None else export_dtypes(plan, self.source.tensors)
        stream = export_weights(self.models, self.family, self.shape, dtypes=dtypes, control=self.mesh.control)
        return stream if plan is None else WireTensors(stream, plan, dequantized=dequantized)

    def save_hf(self, dest: Path) -> None:
        """Write a complete Hugging Face folder, whole or not at all. Raises CheckpointError on every rank if it cannot be."""
        tensors = self.export()
        failure: CheckpointError | None = None
        if self.mesh.rank == 0:
            try:
                write_hf_folder(dest, ((name, t) for name, t in tensors if t is not None), self.source)
            except OSError as error:
                failure = CheckpointError(f"{dest} cannot be written ({error}): free space or choose another place")
            except CheckpointError as error:
                failure = error
        for _ in tensors:  # the export is collective: after a failure too, every rank runs it to its end
            pass
        self.mesh.raise_everywhere(self.mesh.broadcast(failure))

    def _run(
        self, batch: Batch, loss: Callable[..., Any], forward_only: bool = False, draw: int | None = None
    ) -> list[dict[str, Any]]:
        """Drive megatron-core's schedule; answers the last stage's report of each of this rank's micro-batches.

        draw: the draw of noise that perturbs every layer, None for none.
        """
        self.routing.start(batch)
        mesh, budget = self.mesh, self.config.optimizer.tokens_per_microbatch
        align = 2 * mesh.cp_size if mesh.cp_size > 1 else 1
        virtual = len(self.chunks) > 1
        packed = pack(batch, budget=budget, align=align, multiple=mesh.dp_size * (mesh.pp_size if virtual else 1))
        mine = packed[mesh.dp_rank :: mesh.dp_size]
        shards = [
            shard(m, cp_size=mesh.cp_size, cp_rank=mesh.cp_rank, device=mesh.device, max_length=budget + 1)
            for m in mine
        ]
        for micro, piece in zip(mine, shards, strict=True):
            piece.stream.noise = None if draw is None else self._noise(micro, draw)
            piece.stream.routing = self.routing.rows(micro)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        moved = [to_device(m, mesh.device) for m in mine] if last else mine
        pairs = list(zip(moved, shards, strict=True))

        def forward_step(
            feed: Iterator[tuple[Microbatch, Shard]], chunk: torch.nn.Module
        ) -> tuple[Any, Callable[..., Any]]:
            micro, piece = next(feed)
            return chunk(piece), lambda scores: self._scored(micro, piece, scores, loss)

        feeds = [iter(pairs) for _ in self.chunks]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=feeds if virtual else feeds[0],
            model=self.chunks if virtual else self.chunks[0],
            num_microbatches=len(mine),
            seq_length=budget,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _noise(self, micro: Microbatch, draw: int) -> Draw:
        mesh, cut = self.mesh, self.config.parallel.sequence and self.config.alp.layers != "logits"
        rows = noise_rows(
            micro,
            cp_size=mesh.cp_size,
            cp_rank=mesh.cp_rank,
            sp_size=mesh.tp_size if cut else 1,
            sp_rank=mesh.tp_rank if cut else 0,
        )
        return Draw(rows.to(mesh.device), self.config.run.seed, draw)

    def _scored(
        self, micro: Microbatch, piece: Shard, scores: tuple[torch.Tensor, ...], loss: Callable[..., Any]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Put the scores of this rank's rows into the whole stream, then ask for the loss.

        Under context parallelizm every rank sees all log-probabilities of the stream, the others' as constants, and
        computes the same loss; each sends gradients through its own rows only, and those add up to the gradient. So
        an objective may look at whole sequences without knowing of any layout.
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

    def _loss(
        self, micro: Microbatch, scores: Scores, objective: Objective, norm: LossNorm
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        logp, entropy = scores.logp, scores.entropy
        # A non-finite value must not raise on one rank in the middle of a schedule: it is noted here, replaced by a
        # constant, and the whole update is refused before the optimizer steps.
        finite = torch.isfinite(logp) & torch.isfinite(entropy)
        topk = None
        if scores.topk is not None and micro.topk_logmu is not None:
            topk = torch.where(finite[:, None], scores.topk, 0.0)[None], micro.topk_logmu[None]
        inputs = LossInputs(
            logp=torch.where(finite, logp, 0.0)[None],
            logmu=None if micro.logmu is None else micro.logmu[None],
            advantages=micro.advantages[None],
            mask=micro.mask[None],
            logold=None if micro.logold is None else micro.logold[None],
            logref=None if micro.logref is None else micro.logref[None],
            rewards=micro.rewards[None],
            seq_ids=micro.seq_ids[None],
            entropy=torch.where(finite, entropy, 0.0)[None],
            topk=topk,
            staleness=None if micro.staleness is None else micro.staleness[None],
            norm=norm,
        )
        out = objective(inputs)
        report = {
            "loss": out.loss.detach(),
            "metrics": out.metrics,
            "source": micro.source,
            "mask": micro.mask,
            "logp": torch.where(finite, logp, math.nan).detach(),
            "entropy": entropy.detach(),
        }
        return out.loss, report

    def _refuse_non_finite(self, batch: Batch, results: list[dict[str, Any]]) -> None:
        flags = [~torch.isfinite(r["logp"]).all() | ~torch.isfinite(r["loss"]) for r in results]
        if not self.mesh.any(bool(torch.stack(flags).any()) if flags else False):
            return
        bad: set[int] = set()
        for report in results:
            rows = report["source"][~torch.isfinite(report["logp"])].cpu().numpy()
            bad.update(batch.ids[np.searchsorted(batch.cu_seqlens, rows, side="right") - 1].tolist())
        found = self.mesh.broadcast(sorted(set().union(*self.mesh.gather(bad))))
        what = f"non-finite log-probabilities in trajectories {found[:20]}" if found else "a non-finite loss"
        mend = "the update is refused, parameters are untouched; lower optimizer.lr or train in fp32"
        self.mesh.raise_everywhere(PrecisionError(f"{what}: {mend}"))

    def _collect(self, batch: Batch, results: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Per-token columns of the whole batch on rank 0, an empty dict elsewhere."""
        parts = []
        for report in results if self.mesh.reports else []:
            trained = report["mask"] > 0
            parts.append([report["source"][trained].cpu().numpy(), *(report[n][trained].cpu().numpy() for n in names)])
        columns = {name: np.zeros(len(batch.tokens), dtype=np.float32) for name in names}
        for part in (piece for pieces in self.mesh.gather(parts) for piece in pieces):
            for name, values in zip(names, part[1:], strict=True):
                columns[name][part[0]] = values
        return columns if self.mesh.rank == 0 else {}

    def _stats(self, batch: Batch, results: list[dict[str, Any]], gradients: Gradients, lr: float) -> UpdateStats:
        columns = self._collect(batch, results, ("logp", "entropy"))
        sums: dict[str, float] = {}
        for report in results if self.mesh.reports else []:
            for name, value in {"loss": report["loss"], **report["metrics"]}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        gathered, sigmas = self.mesh.gather(sums), self._sigmas()
        if self.mesh.rank != 0:
            return UpdateStats(gradients.norm, lr)
        totals: dict[str, float] = {}
        for part in gathered:
            for name, value in part.items():
                totals[name] = totals.get(name, 0.0) + value
        loss, metrics = totals.pop("loss"), totals | sigmas | gradients.metrics
        return UpdateStats(gradients.norm, lr, loss, metrics, columns["logp"], columns["entropy"])

    def _sigmas(self) -> dict[str, float]:
        """The scales of the perturbation by now, per layer (from 0) and over layers; empty without one. On rank 0."""
        if not self.config.alp.enabled:
            return {}
        holders = [holder for model in self.models for holder in sigma_holders(model)]
        parts = self.mesh.gather({holder.layer_index: holder.sigma for holder in holders})
        by_layer = dict(sorted(item for part in parts for item in part.items()))
        if not by_layer:
            return {}
        values = list(by_layer.values())
        over = {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}
        last = self.shape.num_layers
        names = {layer: f"{layer:0{len(str(last - 1))}d}" for layer in range(last)} | {last: "logits"}
        each = {f"alp/sigma/{names[layer]}": sigma for layer, sigma in by_layer.items()}
        return {f"alp/sigma_{name}": value for name, value in over.items()} | each
