"""The time of the matrix products of a step alone: what no trainer on this machine can be faster than."""

import json
import time
from pathlib import Path

import torch

PROMPT_TOKENS = 6  # of the arithmetic task, about


def products_seconds(model: Path, *, rows: int, new_tokens: int, updates: int, threads: int) -> float:
    """Return the seconds of the products of linears and head: sampling, old log-probabilities, updates.

    Every row is as long as it may be. Old log-probabilities are computed for all updates but the first.

    Args:
        model: folder of a dense model.
        rows: responses of a step.
        new_tokens: tokens of a response.
        updates: number of updates.
        threads: threads of torch.
    """
    config = json.loads((model / "config.json").read_text())
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    layer = [(hidden, queries + 2 * keys), (queries, hidden), (hidden, 2 * inner), (inner, hidden)]
    linears = config["num_hidden_layers"] * layer + [(hidden, config["vocab_size"])]
    tokens = rows * (PROMPT_TOKENS + new_tokens) // updates  # of one update
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sampling = sum(_seconds(rows, *linear) for linear in linears) * new_tokens
        forward = sum(_seconds(tokens, *linear) for linear in linears)
        backward = sum(_seconds(tokens, out, size) + _seconds(out, tokens, size) for size, out in linears)
    finally:
        torch.set_num_threads(before)
    return sampling + (2 * updates - 1) * forward + updates * backward


def _seconds(rows: int, inner: int, columns: int, repeat: int = 7) -> float:
    """Return the median time of [rows, inner] x [inner, columns]."""
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeat // 2]
