"""A training step with perturbed layers against one without: time, bytes saved for backward, and peak memory.

Both run alternately in one process, on the same tokens. The overhead is the median of the ratios of back-to-back pairs.
Prints a line per model, and one JSON line for docs/benchmarks.md.

    OMP_NUM_THREADS=1 python benchmarks/alp.py [--repeat 10 --only tiny medium]
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import peak_bytes
from models import build_planned_policy, make_qwen3

from megatron_rl.config import make_config
from megatron_rl.objectives import make_objective
from megatron_rl.policy import parallel
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.device_port import pick_device
from megatron_rl.types import Batch

MODELS = {"tiny": (128, 2, 320), "medium": (512, 4, 2048)}  # hidden size, layers, vocabulary
SEQUENCES, LENGTH = 32, 64


def make_batch(vocab: int) -> Batch:
    rng, total = np.random.default_rng(0), SEQUENCES * LENGTH
    mask = np.tile(np.arange(LENGTH) >= LENGTH // 2, SEQUENCES).astype(np.float32)
    return Batch(
        ids=np.arange(SEQUENCES),
        groups=np.arange(SEQUENCES) // 8,
        tokens=rng.integers(0, vocab, total).astype(np.int32),
        cu_seqlens=np.arange(0, total + 1, LENGTH),
        mask=mask,
        rewards=np.zeros(SEQUENCES, dtype=np.float32),
        advantages=rng.standard_normal(SEQUENCES).astype(np.float32),
        logmu=(rng.uniform(-7, -4, total) * mask).astype(np.float32),
    )


def make_policy(folder: Path, enabled: bool) -> Policy:
    config = make_config(
        {
            "model": {"path": str(folder)},
            "alp": {"enabled": enabled},
            "optimizer": {"tokens_per_microbatch": SEQUENCES * LENGTH},
            "rollout": {"max_prompt_tokens": 32, "max_new_tokens": 32},
        }
    )
    return build_planned_policy(config, parallel.initialize(config.parallel, pick_device("auto"), seed=0))


def seconds(run: Callable[[], object]) -> float:
    """Return the seconds that `run` takes.

    On CPU this is the processor time of this process, so that other processes count only through the caches they empty.
    On a GPU it is wall-clock time.
    """
    if not torch.cuda.is_available():
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def saved_bytes(run: Callable[[], object]) -> int:
    """Return the bytes that autograd saves for backward in a step."""
    sizes: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(sizes)


def measure(folder: Path, vocab: int, repeat: int) -> dict[str, Any]:
    """Measure a step without and with noise.

    Returns: median seconds, the overhead (from the median ratio of back-to-back pairs), bytes saved and peak bytes.
    """
    batch, objective = make_batch(vocab), make_objective({"name": "drpo", "delta": 0.15})
    steps = [
        functools.partial(make_policy(folder, on).update, batch, objective, objective.norm) for on in (False, True)
    ]
    saved = [saved_bytes(step) for step in steps]  # The first steps are also the warm-up.
    peak = [peak_bytes(step) for step in steps]
    pairs = []
    for turn in range(repeat):  # Each of the two goes first in every second round.
        order = (0, 1) if turn % 2 == 0 else (1, 0)
        pairs.append([second for _, second in sorted((which, seconds(steps[which])) for which in order)])
    return {
        "seconds": [round(statistics.median(column), 4) for column in zip(*pairs, strict=True)],
        "overhead": round(statistics.median(on / off for off, on in pairs) - 1, 4),
        "bytes_saved": saved,
        "peak_bytes": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in args.only:
        hidden, layers, vocab = MODELS[name]
        with tempfile.TemporaryDirectory() as folder:
            found = measure(make_qwen3(Path(folder), hidden=hidden, layers=layers, vocab=vocab), vocab, args.repeat)
        results[name] = found
        (off, on), (low, high) = found["bytes_saved"], found["peak_bytes"]
        print(
            f"{name}: step {found['overhead']:+.1%}, bytes kept {off} {on - off:+d}, peak {low} {high / low - 1:+.2%}",
            flush=True,
        )
    print(json.dumps(results))
    parallel.shutdown()


if __name__ == "__main__":
    main()
