"""Sizes, arithmetic and tables of `benchmarks/gpu.py`: what needs no GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

# Dense bf16 products of NVIDIA's data sheets, in FLOP/s, by a part of the device's name. The first that fits counts.
PEAKS = {"H200": 989.4e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989.4e12, "A100": 312e12}
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """A Qwen3 model with tied embeddings and an MLP three times as wide as the hidden states.

    Attributes:
        hidden: width of the hidden states.
        layers: number of layers.
        vocab: size of the vocabulary.
        heads: number of heads of queries.
        kv_heads: number of heads of keys and values.
        head_dim: width of a head.
    """

    hidden: int
    layers: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def layer_weights(self) -> int:
        """The number of matrix entries of one layer."""
        return self.hidden * (2 * (self.heads + self.kv_heads) * self.head_dim + 9 * self.hidden)

    @property
    def weights(self) -> int:
        """The number of entries of all matrices."""
        return self.layers * self.layer_weights + self.vocab * self.hidden


SIZES = {"0.6B": Size(1024, 28, 151_936, 16, 8, 128), "1.7B": Size(2048, 28, 151_936, 16, 8, 128)}
TINY = {"tiny": Size(128, 2, 512, 4, 2, 32)}


def step_flops(size: Size, lengths: Sequence[int], scored: int) -> dict[str, float]:
    """Return the floating-point operations of a training step without recomputation, by part.

    A product of [m, k] and [k, n] has 2mkn operations. Backward has twice those of forward. Attention is causal, so
    half of the scores are computed. Norms, RoPE, softmax and the optimizer are not counted.

    Args:
        size: the model.
        lengths: number of tokens of each sequence.
        scored: number of tokens whose log-probability is computed.
    """
    width = size.heads * size.head_dim
    return {
        "layers": 6.0 * size.layers * size.layer_weights * sum(lengths),
        "attention": 6.0 * size.layers * width * sum(length**2 for length in lengths),
        "head": 6.0 * size.vocab * size.hidden * scored,
    }


def peak_flops(device: str) -> float | None:
    """Return the dense bf16 FLOP/s of a device by its name, None if the name is not known."""
    return next((peak for part, peak in PEAKS.items() if part in device), None)


def utilization(flops: float, seconds: float, device: str) -> float | None:
    """Return the model FLOPs utilization against the device's bf16 peak, also for FP8. None: the peak is not known.

    Args:
        flops: operations of a step.
        seconds: time of the step.
        device: name of the device.
    """
    peak = peak_flops(device)
    return None if peak is None else flops / seconds / peak


def table_of(name: str, section: dict[str, Any]) -> Table:
    """Return the rows of a section as a table, with what went wrong or why the section was skipped.

    Args:
        name: the section.
        section: its result, as `benchmarks/gpu.py` writes it.
    """
    rows: list[Row] = section["rows"]
    columns = list(dict.fromkeys(column for row in rows for column in row if not isinstance(row[column], dict)))
    words = section["skipped"] or section["error"]
    title = f"{name}, {section['seconds']:.0f} s"
    table = Table(*(columns or [title]), title=title, caption=words)
    if not rows:
        table.add_row(words or "nothing was measured")
        table.title = table.caption = None
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    return table


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
