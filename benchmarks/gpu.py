"""A training step, the head, ALP and weight transfers on a GPU, with random Qwen3 models that are made on the spot.

Every section runs in a process of its own and is ended after its limit; the rows that it measured until then count.
Prints a table for each section, and writes one JSON file with the device and the versions. Without a GPU it is refused,
but `--device cpu --tiny` runs the same code at toy size, to show that it works. Its figures say nothing about GPUs.

    python benchmarks/gpu.py [--only step logprobs --limit-s 240 --repeat 5 --out gpu.json]
"""

import argparse
import functools
import gc
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from gpu_figures import SIZES, TINY, Row, Size, step_flops, table_of, utilization
from gpu_transfer import broadcasts, mappings
from memory import peak_bytes
from models import build_planned_policy, make_qwen3
from rich.console import Console
from step import make_batch
from timing import seconds

from megatron_rl.config import ParallelConfig, make_config
from megatron_rl.doctor import describe_machine
from megatron_rl.errors import PrecisionError
from megatron_rl.objectives import make_objective
from megatron_rl.policy import parallel
from megatron_rl.policy.device_port import pick_device
from megatron_rl.policy.logprobs import token_scores
from megatron_rl.precision.machine import execution_mode, this_machine

BF16 = {"train": "bf16"}
RECIPES = ("blockwise", "tensorwise")
# Tokens of a micro-batch, scored tokens of the head, and bytes of the buckets: of a GPU, and of the toy size.
TOKENS, HEAD_TOKENS, BUCKETS = (16_384, 256), (65_536, 512), (1 << 30, 1 << 18)


class Unavailable(Exception):
    """This machine cannot run a section. The message says why."""


@dataclass(frozen=True)
class Settings:
    """What the sections are run with.

    Attributes:
        device: cuda or cpu.
        tiny: whether models and batches have toy size.
        repeat: number of measurements of each kind.
        folder: where models are written.
    """

    device: str
    tiny: bool
    repeat: int
    folder: Path

    @property
    def sizes(self) -> dict[str, Size]:
        """The models."""
        return TINY if self.tiny else SIZES

    def median(self, run: Callable[[], object]) -> float:
        """Return the median seconds of a call, after two that are not counted."""
        for _ in range(2):
            run()
        return statistics.median(seconds(run, self.device) for _ in range(self.repeat))


def _model(settings: Settings, name: str) -> Path:
    """Return the folder of a model, which the first section that needs it writes."""
    folder, size = settings.folder / name, settings.sizes[name]
    if not (folder / "config.json").is_file():
        heads = {"num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads, "head_dim": size.head_dim}
        sizes = {**heads, "max_position_embeddings": 32_768, "dtype": torch.bfloat16}
        make_qwen3(folder, hidden=size.hidden, layers=size.layers, vocab=size.vocab, **sizes)
    return folder


def _update(settings: Settings, name: str, parts: int = 1, **sections: Any) -> tuple[Callable[[], object], Any]:
    """Return a training step of a new policy, and its batch.

    Args:
        settings: the settings.
        name: the model.
        parts: number of micro-batches.
        sections: sections of the configuration.
    """
    tokens, vocab = TOKENS[settings.tiny], settings.sizes[name].vocab
    config = make_config(
        {
            "model": {"path": str(_model(settings, name))},
            "optimizer": {"tokens_per_microbatch": tokens // parts, "updates_per_step": 1},
            "rollout": {"max_prompt_tokens": tokens // 4, "max_new_tokens": tokens // 4},
            **sections,
        }
    )
    mesh = parallel.initialize(config.parallel, pick_device(settings.device), seed=0)
    policy, objective = build_planned_policy(config, mesh), make_objective({"name": "drpo"})
    batch = make_batch(argparse.Namespace(tokens=tokens, vocab=vocab, prompt_share=0.2))
    return functools.partial(policy.update, batch, objective, objective.norm), batch


def _release() -> None:
    """Give the memory of policies that are no longer used back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def step_rows(settings: Settings) -> Iterator[Row]:
    """Measure a step in bf16 and in the FP8 recipes that the machine can run."""
    device = torch.cuda.get_device_name() if settings.device == "cuda" else "CPU"
    for name, size in settings.sizes.items():
        for recipe in ("none", *RECIPES):
            row: Row = {"model": name, "recipe": recipe}
            try:
                if recipe != "none":
                    row["computed"] = execution_mode(recipe, this_machine())
            except PrecisionError as error:
                yield row | {"computed": f"not here: {error}"}
                continue
            update, batch = _update(settings, name, precision={**BF16, "recipe": recipe})
            taken, peak = settings.median(update), peak_bytes(update)
            flops = sum(step_flops(size, batch.lengths.tolist(), int(batch.mask.sum())).values())
            yield row | {
                "ms": taken * 1e3,
                "tokens/s": len(batch.tokens) / taken,
                "TFLOP/s": flops / taken / 1e12,
                "MFU": utilization(flops, taken, device),
                "peak MiB": peak / 2**20,
            }
            del update
            _release()


def sync_rows(settings: Settings) -> Iterator[Row]:
    """Count how often a step waits for the device, with one and with two micro-batches."""
    if settings.device != "cuda":
        raise Unavailable("torch reports waits for a GPU alone; tests/unit/policy/test_host_syncs.py counts calls")
    for name in settings.sizes:
        for parts in (1, 2):
            update, _ = _update(settings, name, parts, precision=BF16)
            update()
            places = host_syncs(update)
            yield {
                "model": name,
                "micro-batches": parts,
                "waits a step": places.total(),
                "places": dict(places.most_common(20)),
            }
            del update
            _release()


def host_syncs(run: Callable[[], object]) -> Counter[str]:
    """Return how often a call waited for the GPU, by the line that waited."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")  # Python says a warning of one line only once otherwise
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return waits(said)


def waits(said: list[warnings.WarningMessage]) -> Counter[str]:
    """Return the number of torch's warnings of a wait for the GPU, by file and line."""
    found = (one for one in said if "synchronizing CUDA operation" in str(one.message))
    return Counter(f"{one.filename}:{one.lineno}" for one in found)


def logprob_rows(settings: Settings) -> Iterator[Row]:
    """Measure forward and backward of the head: log-probabilities and entropies of many tokens."""
    device = pick_device(settings.device)
    parallel.initialize(ParallelConfig(), device, seed=0)
    size, tokens = next(iter(settings.sizes.values())), HEAD_TOKENS[settings.tiny]
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device, "requires_grad": True}
    hidden, weight = torch.randn(tokens, size.hidden, **options), torch.randn(size.vocab, size.hidden, **options)
    labels = torch.randint(0, size.vocab, (tokens,), device=device)
    settled = {"temperature": 1.0, "vocab_size": size.vocab, "group": dist.group.WORLD}
    for fp32 in (False, True):

        def both(fp32: bool = fp32) -> None:
            hidden.grad = weight.grad = None
            logp, entropy = token_scores(hidden, weight, labels, fp32_product=fp32, **settled)  # type: ignore[arg-type]
            (logp.sum() + entropy.sum()).backward()

        yield {
            "product": "fp32" if fp32 else "bf16",
            "tokens": tokens,
            "vocabulary": size.vocab,
            "ms": settings.median(both) * 1e3,
            "peak MiB": peak_bytes(both) / 2**20,
            "all logits in fp32, MiB": tokens * size.vocab * 4 / 2**20,
        }


def alp_rows(settings: Settings) -> Iterator[Row]:
    """Measure a step with and without perturbed layers, alternating."""
    for name in settings.sizes:
        plain, noisy = (_update(settings, name, precision=BF16, alp={"enabled": on})[0] for on in (False, True))
        for update in (plain, noisy, plain, noisy):
            update()
        pairs = [(seconds(plain, settings.device), seconds(noisy, settings.device)) for _ in range(settings.repeat)]
        without, along = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
        overhead = statistics.median(noisy_s / plain_s for plain_s, noisy_s in pairs) - 1
        yield {"model": name, "ms without": without, "ms with": along, "overhead": overhead}
        del plain, noisy, update
        _release()


def broadcast_rows(settings: Settings) -> Iterator[Row]:
    """Measure the broadcast of a model's weights to another GPU."""
    if settings.device == "cuda" and torch.cuda.device_count() < 2:
        raise Unavailable("it needs two GPUs, because NCCL takes no two members on one")
    receiver = torch.device("cuda", 1) if settings.device == "cuda" else torch.device("cpu")
    for name, weights in _weights(settings):
        with broadcasts(weights, BUCKETS[settings.tiny], receiver) as send:
            yield _transfer_row(settings, name, weights, send)


def mapping_rows(settings: Settings) -> Iterator[Row]:
    """Measure how a process of the same GPU maps a model's weights, and copies them."""
    for name, weights in _weights(settings):
        with mappings(weights, BUCKETS[settings.tiny]) as send:
            yield _transfer_row(settings, name, weights, send)


def _weights(settings: Settings) -> Iterator[tuple[str, list[tuple[str, torch.Tensor]]]]:
    """Yield bf16 matrices with as many entries as each model has: one for each layer, and the embedding."""
    device = pick_device(settings.device)
    for name, size in settings.sizes.items():
        layers = [(f"layer {i}", (size.layer_weights // size.hidden, size.hidden)) for i in range(size.layers)]
        shapes = [*layers, ("embedding", (size.vocab, size.hidden))]
        yield name, [(which, torch.randn(shape, dtype=torch.bfloat16, device=device)) for which, shape in shapes]


def _transfer_row(
    settings: Settings, name: str, weights: list[tuple[str, torch.Tensor]], send: Callable[[], None]
) -> Row:
    nbytes, wall = sum(tensor.nbytes for _, tensor in weights), []
    send()  # makes the connections, and checks what arrives
    for _ in range(settings.repeat):
        start = time.perf_counter()  # of the wall, also on a CPU, because two processes work
        send()
        wall.append(time.perf_counter() - start)
    taken = statistics.median(wall)
    return {"model": name, "GB": nbytes / 1e9, "ms": taken * 1e3, "GB/s": nbytes / 1e9 / taken}


SECTIONS: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "step": step_rows,
    "logprobs": logprob_rows,
    "syncs": sync_rows,
    "alp": alp_rows,
    "broadcast": broadcast_rows,
    "ipc": mapping_rows,
}


def _serve(name: str, settings: Settings, pipe: Connection) -> None:
    """Send every row of a section when it is measured, then how the section ended."""
    torch.set_num_threads(1)
    try:
        for row in SECTIONS[name](settings):
            pipe.send(("row", row))
        pipe.send(("end", None))
    except Unavailable as reason:
        pipe.send(("skipped", str(reason)))
    except Exception as error:  # noqa: BLE001  a process boundary: the other sections go on
        pipe.send(("error", f"{type(error).__name__}: {error}"))
    parallel.shutdown()


def measure(name: str, settings: Settings, limit_s: float) -> dict[str, Any]:
    """Run a section in a process of its own.

    Args:
        name: key of `SECTIONS`.
        settings: the settings.
        limit_s: seconds after which the process is ended.

    Returns:
        The rows, the seconds, and why the section was skipped or ended early (else None).
    """
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(name, settings, theirs))
    start = time.monotonic()
    process.start()
    theirs.close()
    found: dict[str, Any] = {"rows": [], "skipped": None, "error": f"it did not end within {limit_s:g} s"}
    try:
        while pipe.poll(max(0.0, start + limit_s - time.monotonic())):
            kind, value = pipe.recv()
            if kind == "row":
                found["rows"].append(value)
                continue
            found |= {"error": None} if kind == "end" else {"error": None, kind: value}
            break
    except EOFError:
        process.join()
        found["error"] = f"its process ended with exit code {process.exitcode}"
    found["seconds"] = round(time.monotonic() - start, 1)
    process.join(0 if found["error"] else 10)
    if process.is_alive():
        for one in (*psutil.Process(process.pid).children(recursive=True), process):
            one.kill()
        process.join()
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options. Ends with words if the device is not there, or is a CPU without --tiny."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models and batches of toy size")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--limit-s", type=float, default=240.0, help="seconds of one section")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    args = parser.parse_args(arguments)
    if args.device == "cpu" and not args.tiny:
        parser.error("a CPU runs only the toy size: add --tiny")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU: repair the driver (megatron-rl doctor), or try --device cpu --tiny")
    if args.repeat < 1:
        parser.error("--repeat must be at least 1")
    return args


def main(arguments: list[str]) -> int:
    """Run the sections and write the results. Return 1 if a section failed."""
    args = parse(arguments)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the sections' processes
    sections, console = {}, Console()
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(args.device, args.tiny, args.repeat, Path(folder))
        for name in args.only:
            sections[name] = measure(name, settings, args.limit_s)
            console.print(table_of(name, sections[name]))
            options = {"device": args.device, "tiny": args.tiny, "repeat": args.repeat, "limit_s": args.limit_s}
            report = {"machine": describe_machine(), "options": options, "sections": sections}
            args.out.write_text(json.dumps(report, indent=1) + "\n")  # after each, so that a kill loses one section
    print(f"results: {args.out}")
    return int(any(section["error"] for section in sections.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
