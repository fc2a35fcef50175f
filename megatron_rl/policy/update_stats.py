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
    parts = _trained_columns(reports, names) if mesh.reports else []
    columns = {name: np.zeros(len(batch.tokens), dtype=np.float32) for name in names}
    for part in (piece for pieces in mesh.gather(parts) for piece in pieces):
        for name, values in zip(names, part[1:], strict=True):
            columns[name][part[0]] = values
    return columns if mesh.rank == 0 else {}


def _trained_columns(reports: Sequence[Report], names: Sequence[str]) -> list[list[np.ndarray]]:
    """Return, per micro-batch, `source` and the columns at trained positions. One copy from the device fetches all."""
    if not reports:
        return []
    wanted = ("source", "mask", *names)
    whole = torch.stack([report[name].double() for report in reports for name in wanted])
    fetched = fetch(whole).numpy().reshape(len(reports), len(wanted), -1)
    parts = []
    for source, mask, *columns in fetched:
        trained = mask > 0
        parts.append([source[trained].astype(np.int64), *(column[trained] for column in columns)])
    return parts


def fetch(values: torch.Tensor) -> torch.Tensor:
    """Return a tensor in host memory. On a GPU this waits for the device, so call it once for many values."""
    return values.cpu()


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
    gathered = mesh.gather(_sums(reports) if mesh.reports else {})
    if mesh.rank != 0:
        return UpdateStats(gradients.norm, lr)
    totals: dict[str, float] = {}
    for part in gathered:
        for name, value in part.items():
            totals[name] = totals.get(name, 0.0) + value
    loss = totals.pop("loss")
    metrics = totals | more | gradients.metrics
    return UpdateStats(gradients.norm, lr, loss, metrics, columns["logp"], columns["entropy"])


def _sums(reports: Sequence[Report]) -> dict[str, float]:
    """Return the sums of loss and metrics over micro-batches. One copy from the device fetches all."""
    found = [
        (name, value) for report in reports for name, value in {"loss": report["loss"], **report["metrics"]}.items()
    ]
    scalars = [value.detach().double().reshape(()) for _, value in found if isinstance(value, torch.Tensor)]
    fetched = iter(fetch(torch.stack(scalars)).tolist() if scalars else ())
    sums: dict[str, float] = {}
    for name, value in found:
        sums[name] = sums.get(name, 0.0) + (next(fetched) if isinstance(value, torch.Tensor) else float(value))
    return sums


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
