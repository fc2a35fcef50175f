"""The sources of the mismatch: one chain of scores of the same tokens, from the engine's to the trainer's.

Neighbors in the chain differ in one thing. Their difference is what this source adds to the log-ratio logp - logmu. The
differences sum to the log-ratio token by token. How much a source gets depends on the order of the chain, as in every
such decomposition; the order is that of SOURCES.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rl.errors import UserError

SOURCES = {
    "decode": "the engine's token by token decoding against its scoring of the whole text",
    "kernel": "the engine's arithmetic, its dtype included, against the trainer's, on the engine's weights",
    "activation": "the engine's quantized inputs of products",
    "sync": "weights the engine holds against the weights it should have been sent: zero unless something is broken",
    "weight": "the precision of the engine's weights",
    "recipe": "the precision of the trainer's own products",
    "staleness": "the trainer's weights now against those of the version that sampled",
}
_JUMP = 5.0


@dataclass(frozen=True)
class ScoreChain:
    """Log-probabilities [N] float64 of the same N sampled tokens, in nats; entry i + 1 is entry i without source i."""

    scores: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, scores: Sequence[np.ndarray]) -> "ScoreChain":
        """Build a chain from its scores.

        Raises:
            UserError: unless there is one score more than sources, and all are flat, of one length, not empty and
                finite.
        """
        columns = tuple(np.asarray(column, dtype=np.float64) for column in scores)
        if len(columns) != len(SOURCES) + 1:
            raise UserError(
                f"a chain has {len(SOURCES) + 1} scores, one on either side of each source; {len(columns)} are given"
            )
        for name, column in zip(("logmu", *SOURCES), columns, strict=True):
            if column.ndim != 1 or column.shape != columns[0].shape or not len(column):
                raise UserError(
                    f"the scores after '{name}' have shape {list(column.shape)}, logmu {list(columns[0].shape)}"
                )
            if not np.isfinite(column).all():
                raise UserError(f"the scores after '{name}' hold numbers that are not finite")
        return cls(columns)

    @property
    def total(self) -> np.ndarray:
        """The log-ratio logp - logmu, [N]."""
        return self.scores[-1] - self.scores[0]

    @property
    def deltas(self) -> dict[str, np.ndarray]:
        """What each source adds to `total`, [N] per source."""
        return {name: self.scores[i + 1] - self.scores[i] for i, name in enumerate(SOURCES)}

    def record(self) -> dict[str, float]:
        """Return flat numbers in nats, `attribution/<source>/...` and the same for `total`.

        mean_abs, q99, max   of |delta|
        rms                  root of mean(delta^2)
        kl                   mean(-delta): its part of the k1 estimate of KL(mu || pi); the parts sum to the total's
        share                mean(delta x total) / mean(total^2): the parts sum to 1, and a part that cancels others
                             is negative; 0 for all if the total is 0 everywhere
        """
        total = self.total
        square = float(np.mean(np.square(total)))
        record: dict[str, float] = {"attribution/tokens": float(len(total))}
        for name, delta in {**self.deltas, "total": total}.items():
            size = np.abs(delta)
            values = {
                "mean_abs": size.mean(),
                "q99": np.quantile(size, 0.99),
                "max": size.max(),
                "rms": np.sqrt(np.mean(np.square(delta))),
                "kl": 0.0 - delta.mean(),  # 0.0 - x avoids -0
                "share": np.mean(delta * total) / square if square else 0.0,
            }
            record |= {f"attribution/{name}/{key}": float(value) for key, value in values.items()}
        return record


def largest_source(record: Mapping[str, Any]) -> str:
    """Return one sentence on the source with the largest root mean square. `record` is that of `ScoreChain.record`."""
    sizes = {name: record[f"attribution/{name}/rms"] for name in SOURCES}
    name = max(sizes, key=lambda key: sizes[key])
    if sizes[name] == 0:
        return "trainer and engine agree on every token, bit for bit"
    at = f"attribution/{name}"
    return (
        f"the largest source is {name} ({SOURCES[name]}): mean |delta| {record[at + '/mean_abs']:.2e}, q99 "
        f"{record[at + '/q99']:.2e}, {record[at + '/share']:.0%} of the mean square of the log ratio"
    )


@dataclass(frozen=True)
class TensorMismatch:
    """A tensor of an engine that differs from the one that was sent.

    Attributes:
        engine: the engine that holds the tensor.
        name: the tensor's name.
        error: |held - sent| / |sent| (Frobenius norms; inf for sent = 0).
        factor: <held, sent> / <sent, sent>, the factor of the tensor if it was scaled by mistake; nan for sent = 0.
        share: share of the elements that differ.
    """

    engine: str
    name: str
    error: float
    factor: float
    share: float

    def __str__(self) -> str:
        scaled = (
            f", {self.factor:.3g} times what was sent" if isfinite(self.factor) and abs(self.factor - 1) > 0.01 else ""
        )
        return (
            f"{self.name} on {self.engine} (relative error {self.error:.2e}, {self.share:.1%} of its elements{scaled})"
        )


def compare_tensors(engine: str, name: str, held: Tensor | None, sent: Tensor) -> TensorMismatch | None:
    """Compare the tensor that an engine holds with the one that was sent; return None if every bit is equal.

    A tensor that is missing or of another shape counts as completely wrong.

    Args:
        engine: name of the engine, for the report.
        name: name of the tensor, for the report.
        held: the engine's tensor; None if it is missing.
        sent: the expected tensor.
    """
    if held is None or held.shape != sent.shape:
        return TensorMismatch(engine, name, float("inf"), float("nan"), 1.0)
    x, y = held.detach().cpu().double(), sent.detach().cpu().double()
    differs = x != y  # also true for NaN
    if not bool(differs.any()):
        return None
    norm = float(torch.linalg.vector_norm(y))
    error = float(torch.linalg.vector_norm(x - y)) / norm if norm else float("inf")
    factor = float((x * y).sum()) / norm**2 if norm else float("nan")
    return TensorMismatch(engine, name, error, factor, float(differs.double().mean()))


def sync_verdict(faults: Sequence[TensorMismatch]) -> str:
    """Return one sentence that names at most three tensors, the largest error first."""
    if not faults:
        return "sync is whole: every tensor the engines hold is the one they should have been sent, bit for bit"
    worst = sorted(faults, key=lambda fault: -fault.error)
    more = f" and {len(worst) - 3} more" if len(worst) > 3 else ""
    return f"sync is broken: other weights than the trainer's are served: {'; '.join(map(str, worst[:3]))}{more}"


def first_diverging_layer(errors: Sequence[float], floor: float) -> int | None:
    """Return the first layer whose error is more than 5 times that of the previous layer, or None.

    `errors` are the relative errors of each layer's outputs, first layer first. `floor` is the error that rounding
    alone causes: smaller errors count as `floor`, and it is also the error of the first layer's input.
    """
    before = floor
    for layer, error in enumerate(errors):
        if not error <= _JUMP * before:  # written this way so that NaN counts as a jump
            return layer
        before = max(error, floor)
    return None


def layer_verdict(errors: Sequence[float], floor: float) -> str:
    """Return one sentence on the result of `first_diverging_layer`."""
    layer = first_diverging_layer(errors, floor)
    if layer is None:
        return f"hidden states agree through all {len(errors)} layers (largest relative error {max(errors):.1e})"
    before = errors[layer - 1] if layer else 0.0
    return f"hidden states part at layer {layer}: relative error {errors[layer]:.1e} after {before:.1e} before it"
