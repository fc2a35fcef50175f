"""Cost of quantization in an export: the part `export` of benchmarks/precision.py.

The stream of a 100M-parameter model comes from the real megatron-core model, in every wire format, in one process. GB/s
counts the bytes of the trainer's parameters. Memory (Linux) is the peak resident size above the one before the stream,
in MB and in units of the largest tensor in fp32.
"""

import argparse
import ctypes
import gc
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from models import build_planned_chunks
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_rl.config import make_config
from megatron_rl.policy import parallel
from megatron_rl.policy.device_port import pick_device
from megatron_rl.precision.plan import resolve
from megatron_rl.weights.export import export_weights
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.hf_model import check_folder
from megatron_rl.weights.load_weights import load_weights
from megatron_rl.weights.quantized import WireTensors, export_dtypes

ROLLOUTS = ("bf16", "fp8_blockwise", "fp8_blockwise_pow2", "int8")


def make_model(folder: Path) -> Path:
    config = Qwen3Config(
        vocab_size=16384,
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=6,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def peak_above(stream: Iterable[tuple[str, torch.Tensor | None]]) -> tuple[float, int, int]:
    """Consume the stream and measure it.

    Returns: seconds of this thread, bytes of the stream, and the peak resident memory above the present one in bytes
    (Linux).
    """
    gc.collect()
    # Without this, memory that previous runs have freed would be used again and not be measured.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # This resets the peak, VmHWM.
    before, sent, started = resident("VmRSS"), 0, time.thread_time()
    for _, tensor in stream:
        assert tensor is not None
        sent += tensor.nbytes
    return time.thread_time() - started, sent, resident("VmHWM") - before


def resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def measure(path: Path, dtype: str, repeat: int) -> list[dict[str, Any]]:
    config = make_config({"model": {"path": str(path)}, "precision": {"train": dtype}})
    mesh = parallel.initialize(config.parallel, pick_device("cpu"), seed=0)
    folder = HFFolder(path)
    source = check_folder(folder)
    family, shape = source.family, source.shape
    chunks = build_planned_chunks(config, shape, mesh)
    load_weights(chunks, source, tp_rank=0, tp_size=1)
    folder.close()
    held = sum(parameter.nbytes for parameter in chunks[0].parameters())
    largest = 4 * max(parameter.numel() for parameter in chunks[0].parameters())
    rows = []
    for rollout in ROLLOUTS:
        plan = resolve(
            config.precision.model_copy(update={"rollout": rollout}), shape.num_layers, engine="embedded", device="cpu"
        )
        dtypes = export_dtypes(plan, source)
        runs = []
        for _ in range(repeat):
            runs.append(peak_above(WireTensors(export_weights(chunks, family, shape, dtypes=dtypes), plan)))
        seconds, sent, _ = min(runs)
        peak = max(run[2] for run in runs)
        rows.append(
            {
                "rollout": rollout,
                "seconds": round(seconds, 3),
                "GB_per_s": round(held / seconds / 1e9, 2),
                "model_MB": round(held / 1e6),
                "sent_MB": round(sent / 1e6),
                "peak_MB": round(peak / 1e6),
                "peak_tensors": round(peak / largest, 2),
            }
        )
    return rows


def part_export(args: argparse.Namespace, console: Console) -> dict[str, object]:
    """Measure the export of a model in `--dtype`, unquantized and in every quantized wire format; best of three."""
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(make_model(Path(folder) / "hf"), args.dtype, repeat=3)
    table = Table(*rows[0], title=f"export of a model in {args.dtype}, CPU, {torch.get_num_threads()} thread(s)")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)
    return {"rows": rows}
