"""The outcome of one optimizer update, gathered on rank 0."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_rl.alp.sigma import sigma_modules
from megatron_rl.policy.optimizer import Gradients
from megatron_rl.policy.parallel import Mesh
from megatron_rl.types import Batch

Report = dict[str, Any]


@dataclass(frozen=True)
class UpdateStats:
    """The result of one optimizer update, complete on rank 0. Other ranks have only `grad_norm` and `lr`.

    Attributes:
        grad_norm: norm of the gradient before clipping.
        lr: learning rate of the update.
        loss: sum over the batch, divided by the norm's denominator.
        metrics: metrics of the objective, the optimizer and the layers.
        logp: [N] float32, log-probability of each token of the batch under the weights before the update; 0 where
            untrained.
        entropy: [N] float32, entropy at each token under the same weights; 0 where untrained.
    """

    grad_norm: float
    lr: float
    loss: float = float("nan")
    metrics: dict[str, float] | None = None
    logp: np.ndarray | None = None
    entropy: np.ndarray | None = None


def gather_columns(mesh: Mesh, batch: Batch, reports: Sequence[Report], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return per-token columns [N] float32 of the whole batch on rank 0, an empty dict elsewhere. Collective.

    Args:
        mesh: the parallel layout.
        batch: the whole batch, of N tokens.
        reports: reports of this rank's micro-batches; each holds `source`, `mask` and the columns.
        names: names of the columns.
    """
    parts = []
    for report in reports if mesh.reports else []:
        trained = report["mask"] > 0
        parts.append([report["source"][trained].cpu().numpy(), *(report[n][trained].cpu().numpy() for n in names)])
    columns = {name: np.zeros(len(batch.tokens), dtype=np.float32) for name in names}
    for part in (piece for pieces in mesh.gather(parts) for piece in pieces):
        for name, values in zip(names, part[1:], strict=True):
            columns[name][part[0]] = values
    return columns if mesh.rank == 0 else {}


def gather_stats(
    mesh: Mesh,
    batch: Batch,
    reports: Sequence[Report],
    gradients: Gradients,
    lr: float,
    more: dict[str, float],
) -> UpdateStats:
    """Return the statistics of an update. Collective.

    Args:
        mesh: the parallel layout.
        batch: the batch of the update.
        reports: reports of this rank's micro-batches.
        gradients: norm and metrics of the optimizer.
        lr: learning rate of the update.
        more: further metrics, on rank 0.
    """
    columns = gather_columns(mesh, batch, reports, ("logp", "entropy"))
    sums: dict[str, float] = {}
    for report in reports if mesh.reports else []:
        for name, value in {"loss": report["loss"], **report["metrics"]}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    gathered = mesh.gather(sums)
    if mesh.rank != 0:
        return UpdateStats(gradients.norm, lr)
    totals: dict[str, float] = {}
    for part in gathered:
        for name, value in part.items():
            totals[name] = totals.get(name, 0.0) + value
    loss = totals.pop("loss")
    metrics = totals | more | gradients.metrics
    return UpdateStats(gradients.norm, lr, loss, metrics, columns["logp"], columns["entropy"])


def gather_sigmas(mesh: Mesh, models: Sequence[torch.nn.Module], num_layers: int) -> dict[str, float]:
    """Return ALP's scales per layer (from 0) and over layers, on rank 0; empty without any. Collective.

    Args:
        mesh: the parallel layout.
        models: this rank's model chunks.
        num_layers: layers of the model.
    """
    holders = [holder for model in models for holder in sigma_modules(model)]
    parts = mesh.gather({holder.layer_index: holder.sigma for holder in holders})
    by_layer = dict(sorted(item for part in parts for item in part.items()))
    if not by_layer:
        return {}
    values = list(by_layer.values())
    over = {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}
    names = {layer: f"{layer:0{len(str(num_layers - 1))}d}" for layer in range(num_layers)} | {num_layers: "logits"}
    each = {f"alp/sigma/{names[layer]}": sigma for layer, sigma in by_layer.items()}
    return {f"alp/sigma_{name}": value for name, value in over.items()} | each
