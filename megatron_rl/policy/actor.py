"""The policy: a model under any parallel layout, which scores tokens and makes optimizer updates."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_rl.errors import CheckpointError, PrecisionError, StorageError, UserError
from megatron_rl.objectives import LossInputs, LossNorm, LossOutputs, Objective
from megatron_rl.policy.loss_denominator import global_norm
from megatron_rl.policy.model import PolicyModel
from megatron_rl.policy.optimizer import PolicyOptimizer
from megatron_rl.policy.packing import Microbatch
from megatron_rl.policy.parallel import Mesh
from megatron_rl.policy.quantized_products import ProductMonitor
from megatron_rl.policy.routing_replay import RoutingReplay, weight_buffers
from megatron_rl.policy.schedule import Loss, NoiseSource, Schedule, Scores
from megatron_rl.policy.update_stats import UpdateStats, gather_columns, gather_sigmas, gather_stats
from megatron_rl.precision.plan import PrecisionPlan
from megatron_rl.types import COLUMNS, Batch
from megatron_rl.weights.export import export_weights
from megatron_rl.weights.hf_model import HFModel
from megatron_rl.weights.load_weights import find_bad_weights, load_weights
from megatron_rl.weights.quantized import WireTensors, export_dtypes
from megatron_rl.weights.write_folder import write_hf_folder

LossFunction = Callable[[LossInputs], LossOutputs]


@dataclass(frozen=True)
class PolicySettings:
    """The few settings that a built policy still needs.

    Attributes:
        tokens_per_microbatch: token budget of a packed micro-batch.
        max_new_tokens: horizon of the loss norms that divide by it.
        alp: updates are perturbed by ALP.
        noise_seed: seed of ALP's noise.
        noise_is_sharded: sequence parallelism shards the inputs that get the noise.
    """

    tokens_per_microbatch: int
    max_new_tokens: int
    alp: bool
    noise_seed: int
    noise_is_sharded: bool


class Policy:
    """The trained model; `policy.build.build_policy` makes it.

    Every method is collective: all ranks must call it in the same way.

    Attributes:
        settings: see `PolicySettings`.
        mesh: the parallel layout.
        source: the Hugging Face model that the weights came from, with its `family` and `shape`.
        models: this rank's pipeline chunks.
        chunks: the same, wrapped for data parallelism.
        optimizer: megatron-core's optimizer.
        products: records the quantized matrix products and holds the delayed scales.
        routing: replays the engine's choice of experts.
    """

    def __init__(
        self,
        settings: PolicySettings,
        mesh: Mesh,
        source: HFModel,
        models: list[PolicyModel],
        chunks: list[DistributedDataParallel],
        optimizer: PolicyOptimizer,
        products: ProductMonitor,
        routing: RoutingReplay,
    ) -> None:
        self.settings, self.mesh, self.source = settings, mesh, source
        self.family, self.shape = source.family, source.shape
        self.models, self.chunks, self.optimizer = models, chunks, optimizer
        self.products, self.routing = products, routing
        self.tf_config = models[0].config
        self._schedule = Schedule(
            chunks,
            mesh,
            routing,
            settings.tokens_per_microbatch,
            boundaries=models[0].reads_boundaries,
            split=not products.plan.trains_low,
        )
        self._reference: list[torch.Tensor] | None = None

    def update(self, batch: Batch, objective: LossFunction, norm: LossNorm, *, own_logold: bool = False) -> UpdateStats:
        """Make one optimizer update on the whole batch. With ALP, new noise perturbs its forward pass at every update.

        If the gradient is exactly 0, for example because no token is trained or every advantage is 0, the optimizer
        makes no step: parameters, moments and warm-up stay as they are.

        Args:
            batch: the whole batch; that of rank 0 is read.
            objective: computes the loss of a micro-batch.
            norm: how the loss is normalized.
            own_logold: `logold` are the log-probabilities of the update's own forward pass. Only for an update without
                noise from the weights that `logold` is about: it saves the pass that would compute it.

        Raises:
            PrecisionError: names the trajectories if a loss, log-probability or gradient is not finite. Parameters,
                optimizer state and delayed scales are then unchanged.
            UserError: if a column of the batch is not finite.
        """
        whole = self.mesh.on_lead(lambda: self._checked_norm(batch, norm))
        scales = [scale.clone() for scale in self.products.scale_tensors()]
        try:
            (results, computed), gradients = self.optimizer.fill(
                lambda: self._differentiate(batch, objective, whole, scales, own_logold)
            )
        except PrecisionError:
            self._put_scales(scales)
            raise
        lr = self.optimizer.lr
        if gradients.norm > 0:  # Adam's momentum would move the weights of a batch that teaches nothing
            self.optimizer.step(gradients.norm)
        sigmas = gather_sigmas(self.mesh, self.models, self.shape.num_layers) if self.settings.alp else {}
        stats = gather_stats(self.mesh, batch, results, gradients, lr, sigmas)
        return stats if stats.metrics is None else replace(stats, metrics=stats.metrics | computed)

    def _checked_norm(self, batch: Batch, norm: LossNorm) -> LossNorm:
        batch.check_finite()
        return global_norm(norm, batch, self.settings.max_new_tokens)

    def _differentiate(
        self,
        batch: Batch,
        objective: LossFunction,
        norm: LossNorm,
        scales: list[torch.Tensor],
        own_logold: bool,
    ) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Run forward and backward of the whole batch into empty gradients.

        Two calls with the same weights and the same delayed `scales` do the same. The arguments are those of `update`.
        Returns the reports of this rank's micro-batches, and metrics of how they were computed.
        """
        self._put_scales(scales)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.products.start()
        draw = self.optimizer.updates if self.settings.alp else None
        loss = partial(self._loss, objective=objective, norm=norm, own_logold=own_logold)
        results = self._run(batch, loss, draw=draw)
        self._refuse_non_finite(results)
        return results, self.products.record() | self.routing.record(batch)

    def _put_scales(self, scales: list[torch.Tensor]) -> None:
        for mine, kept in zip(self.products.scale_tensors(), scales, strict=True):
            mine.copy_(kept)

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> np.ndarray:
        """Return the log-probability of every trained token of the batch, 0 elsewhere: [N] float32, on rank 0.

        Other ranks get an array without entries. `batch` is the whole batch; that of rank 0 is read.
        """

        def keep(micro: Microbatch, scores: Scores) -> tuple[torch.Tensor, dict[str, Any]]:
            logp = scores.logp
            report = {"source": micro.source, "ids": micro.ids, "mask": micro.mask, "logp": logp}
            return logp.sum(), report | {"loss": logp.new_zeros(())}

        results = self._run(batch.with_columns(topk_ids=None, topk_logmu=None), keep, forward_only=True)
        self._refuse_non_finite(results)
        return gather_columns(self.mesh, batch, results, ("logp",)).get("logp", np.zeros(0, dtype=np.float32))

    # Copies of the weights ---------------------------------------------------------------------------------

    @torch.no_grad()
    def keep_reference(self, source: HFModel | None = None) -> None:
        """Make the weights of another folder the reference policy, or the present ones. The policy's own stay.

        Call it before a checkpoint is restored, so that a resumed run measures against the same model as before.

        Args:
            source: a folder from `find_reference`; None: the present weights.

        Raises:
            CheckpointError: the folder's weights are damaged.
            PrecisionError: they do not fit the trainer's dtype, or `copy_weights` raises it.
        """
        kept = self.copy_weights()
        if source is not None:
            load_weights(self.models, source, tp_rank=self.mesh.tp_rank, tp_size=self.mesh.tp_size)
            failures = self.mesh.gather(find_bad_weights(self.models, source))
            self._swap(kept)  # own weights are back, bit by bit, and the folder's are kept
            self.mesh.raise_everywhere(self.mesh.broadcast(next(filter(None, failures), None)))
        self._reference = kept

    @torch.no_grad()
    def copy_weights(self) -> list[torch.Tensor]:
        """Copy this rank's parameters to host memory, with the delayed scales that their scores depend on.

        Raises PrecisionError if these scales cannot be read.
        """
        if self.products.unreachable_scales:
            self.mesh.raise_everywhere(
                PrecisionError(
                    "precision.recipe is delayed, and Transformer Engine keeps the scales of its layers to itself: "
                    "earlier weights (a reference, a teacher, an attribution) would be scored with present scales; set "
                    "precision.recipe: tensorwise or blockwise, or an objective that needs no reference"
                )
            )
        return [_on_host(tensor) for tensor in self._weights()]

    @torch.no_grad()
    def put_weights(self, copied: list[torch.Tensor]) -> None:
        """Restore parameters and delayed scales from `copy_weights`.

        The optimizer's master weights are not touched; restore the original weights before stepping.
        """
        for mine, other in zip(self._weights(), copied, strict=True):
            mine.copy_(other)

    def reference_logprobs(self, batch: Batch) -> np.ndarray:
        """Return `logprobs` under the reference policy: [N] float32, on rank 0.

        The policy's own weights are restored afterwards, bit by bit, also after an error. Raises UserError if no
        reference is kept.
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
        """Exchange weights and copies in place, without a third copy. Views into the optimizer's buffers stay views."""
        for mine, other in zip(self._weights(), kept, strict=True):
            present = _on_host(mine)
            mine.copy_(other)
            other.copy_(present)

    def _weights(self) -> Iterator[torch.Tensor]:
        """Yield every tensor that scores depend on, without a copy: parameters, weights in buffers, delayed scales."""
        for model in self.models:
            yield from (parameter.data for parameter in model.parameters())
            yield from (buffer for _, buffer in weight_buffers(model))
        yield from self.products.scale_tensors()

    # Export ------------------------------------------------------------------------------------------------

    def export(
        self, plan: PrecisionPlan | None = None, *, dequantized: bool = False
    ) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yield Hugging Face names and tensors in table order. The tensors are on rank 0; other ranks get None.

        Args:
            plan: decides how the tensors are sent to engines; None: they are in the dtypes of the source folder.
            dequantized: as in `WireTensors`.
        """
        dtypes = self.source.dtypes if plan is None else export_dtypes(plan, self.source)
        stream = export_weights(self.models, self.family, self.shape, dtypes=dtypes, control=self.mesh.control)
        return stream if plan is None else WireTensors(stream, plan, dequantized=dequantized)

    def save_hf(self, dest: Path) -> None:
        """Write a Hugging Face folder, complete or not at all. Raises CheckpointError on every rank on failure.

        What the source holds and the trainer does not train (`HFModel.carried`) is in the folder, unchanged.
        """
        tensors = self.export()
        failure: CheckpointError | None = None
        if self.mesh.rank == 0:
            try:
                trained = ((name, t) for name, t in tensors if t is not None)
                write_hf_folder(dest, chain(trained, self.source.carried()), self.source)
            except OSError as error:
                failure = StorageError(f"{dest} cannot be written ({error}): free space or choose another place")
            except CheckpointError as error:
                failure = error
        for _ in tensors:  # the export is collective: every rank must run it to its end, also after a failure
            pass
        self.mesh.raise_everywhere(self.mesh.broadcast(failure))

    # One pass ----------------------------------------------------------------------------------------------

    def _run(
        self, batch: Batch, loss: Loss, forward_only: bool = False, draw: int | None = None
    ) -> list[dict[str, Any]]:
        """Run one pass; see `Schedule.run`. `draw` numbers the noise that perturbs every layer; None for no noise."""
        noise = None
        if draw is not None:
            noise = NoiseSource(self.settings.noise_seed, draw, self.settings.noise_is_sharded)
        return self._schedule.run(batch, loss, forward_only=forward_only, noise=noise)

    def _loss(
        self, micro: Microbatch, scores: Scores, *, objective: LossFunction, norm: LossNorm, own_logold: bool
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        logp, entropy = scores.logp, scores.entropy
        # A non-finite value must not raise on one rank in the middle of a schedule: it is noted here, replaced by a
        # constant, and the whole update is refused before the optimizer steps.
        finite = torch.isfinite(logp) & torch.isfinite(entropy)
        columns = {name: t[None] for name, t in micro.columns.items() if COLUMNS[name].packed == "label"}
        topk, topk_logmu = None, columns.pop("topk_logmu", None)
        if scores.topk is not None and topk_logmu is not None:
            attached = isinstance(objective, Objective) and objective.score_centering is not None
            topk_logp = scores.topk if attached else scores.topk.detach()
            topk = torch.where(finite[:, None], topk_logp, 0.0)[None], topk_logmu
        columns.pop("topk_ids", None)  # `scores.topk` are their log-probabilities
        used = torch.where(finite, logp, 0.0)[None]
        if own_logold:
            columns["logold"] = used.detach()
        inputs = LossInputs.of(
            columns,
            logp=used,
            entropy=torch.where(finite, entropy, 0.0)[None],
            seq_ids=micro.seq_ids[None],
            topk=topk,
            norm=norm,
        )
        out = objective(inputs)
        report = {
            "loss": out.loss.detach(),
            "metrics": out.metrics,
            "source": micro.source,
            "ids": micro.ids,
            "mask": micro.mask,
            "logp": torch.where(finite, logp, math.nan).detach(),
            "entropy": entropy.detach(),
        }
        return out.loss, report

    def _refuse_non_finite(self, results: list[dict[str, Any]]) -> None:
        flags = [~torch.isfinite(r["logp"]).all() | ~torch.isfinite(r["loss"]) for r in results]
        if not self.mesh.any(bool(torch.stack(flags).any()) if flags else False):
            return
        bad: set[int] = set()
        for report in results:
            bad.update(report["ids"][~torch.isfinite(report["logp"])].tolist())
        found = self.mesh.broadcast(sorted(set().union(*self.mesh.gather(bad))))
        what = f"non-finite log-probabilities in trajectories {found[:20]}" if found else "a non-finite loss"
        mend = "the update is refused, parameters are untouched; lower optimizer.lr or train in fp32"
        self.mesh.raise_everywhere(PrecisionError(f"{what}: {mend}"))


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in host memory. From a GPU it is pinned, so that copies run at the speed of the bus."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)
