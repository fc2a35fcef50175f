"""A training step with emulated low precision against the same step unquantized, back to back in each round.

Recipes train in bf16. On a CPU without bf16 arithmetic, torch's bf16 products can be much slower than its fp32
products, which the emulation uses. Therefore an fp32 step is also measured, and the table has the ratios to both.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from models import build_planned_policy, make_qwen3
from rich.console import Console
from rich.table import Table
from step import make_batch

from megatron_rl.config import make_config
from megatron_rl.objectives import make_objective
from megatron_rl.policy import parallel
from megatron_rl.policy.device_port import pick_device

SIZES = argparse.Namespace(hidden=256, layers=4, vocab=512, tokens=1024, prompt_share=0.0)
STEPS = {
    "bf16": {"train": "bf16"},
    "fp32": {"train": "fp32"},
    **{
        recipe: {"train": "bf16", "recipe": recipe}
        for recipe in ("tensorwise", "delayed", "blockwise", "mxfp8", "nvfp4")
    },
}


def part_step(args: argparse.Namespace, console: Console) -> dict[str, object]:
    """Measure a step of each recipe.

    The time is that of the calling thread. The ratios to bf16 and fp32 are medians over rounds; above 1 is slower.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = make_qwen3(Path(folder), hidden=SIZES.hidden, layers=SIZES.layers, vocab=SIZES.vocab, tied=False)
        steps = _steps(model)
    for step in (*steps.values(), *steps.values()):
        step()
    rounds = [{name: _seconds(step) for name, step in steps.items()} for _ in range(args.repeat)]
    rows = [
        {
            "step": name,
            "ms": statistics.median(one[name] for one in rounds) * 1e3,
            **{
                f"times {base}": statistics.median(one[name] / one[base] for one in rounds) for base in ("bf16", "fp32")
            },
        }
        for name in steps
    ]
    table = Table(
        "step",
        "ms",
        "times bf16",
        "times fp32",
        title=", ".join(f"{name} {size}" for name, size in vars(SIZES).items()),
    )
    for row in rows:
        table.add_row(str(row["step"]), f"{row['ms']:.0f}", f"{row['times bf16']:.2f}", f"{row['times fp32']:.2f}")
    console.print(table)
    parallel.shutdown()
    return {"sizes": vars(SIZES), "rows": rows}


def _steps(model: Path) -> dict[str, Callable[[], object]]:
    """Return one update per entry of STEPS, each of its own policy, all on the same batch."""
    batch, objective = make_batch(SIZES), make_objective({"name": "drpo"})
    steps: dict[str, Callable[[], object]] = {}
    mesh = None
    for name, precision in STEPS.items():
        config = make_config(
            {
                "model": {"path": str(model)},
                "precision": precision,
                "optimizer": {"tokens_per_microbatch": SIZES.tokens, "updates_per_step": 1},
                "rollout": {"max_prompt_tokens": SIZES.tokens // 2, "max_new_tokens": SIZES.tokens // 2},
            }
        )
        mesh = mesh or parallel.initialize(config.parallel, pick_device("auto"), seed=0)
        policy = build_planned_policy(config, mesh)
        steps[name] = lambda policy=policy: policy.update(batch, objective, objective.norm)
    return steps


def _seconds(step: Callable[[], object]) -> float:
    start = time.thread_time()
    step()
    return time.thread_time() - start
