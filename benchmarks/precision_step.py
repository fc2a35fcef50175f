"""A training step with emulated low precision against the same step in bf16, run one after the other in each round."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from step import make_batch, make_model

from megatron_rl.config import make_config
from megatron_rl.objectives import make_objective
from megatron_rl.policy import parallel
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.device import pick_device

SIZES = argparse.Namespace(hidden=256, layers=4, vocab=512, tokens=1024, prompt_share=0.0)
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8", "nvfp4")


def part_step(args: argparse.Namespace, console: Console) -> dict[str, object]:
    """Seconds of the calling thread per step, and the median over rounds of recipe / bf16: above 1, the recipe is slower."""
    with tempfile.TemporaryDirectory() as folder:
        steps = _steps(make_model(Path(folder), SIZES))
    for step in (*steps.values(), *steps.values()):
        step()
    rounds = [{name: _seconds(step) for name, step in steps.items()} for _ in range(args.repeat)]
    rows = [
        {
            "recipe": name,
            "ms": statistics.median(one[name] for one in rounds) * 1e3,
            "ratio": statistics.median(one[name] / one["none"] for one in rounds),
        }
        for name in steps
    ]
    table = Table("recipe", "step, ms", "times bf16", title=f"bf16 training, {SIZES}")
    for row in rows:
        table.add_row(str(row["recipe"]), f"{row['ms']:.0f}", f"{row['ratio']:.2f}")
    console.print(table)
    parallel.shutdown()
    return {"sizes": vars(SIZES), "rows": rows}


def _steps(model: Path) -> dict[str, Callable[[], object]]:
    """One update of a policy of its own per recipe, `none` first; all on the same batch."""
    batch, objective = make_batch(SIZES), make_objective({"name": "drpo"})
    steps: dict[str, Callable[[], object]] = {}
    mesh = None
    for recipe in ("none", *RECIPES):
        config = make_config(
            {
                "model": {"path": str(model)},
                "precision": {"train": "bf16", "recipe": recipe},
                "optimizer": {"tokens_per_microbatch": SIZES.tokens, "updates_per_step": 1},
                "rollout": {"max_prompt_tokens": SIZES.tokens // 2, "max_new_tokens": SIZES.tokens // 2},
            }
        )
        mesh = mesh or parallel.initialize(config.parallel, pick_device("auto"), seed=0)
        policy = Policy(config, mesh)
        steps[recipe] = lambda policy=policy: policy.update(batch, objective, objective.norm)
    return steps


def _seconds(step: Callable[[], object]) -> float:
    start = time.thread_time()
    step()
    return time.thread_time() - start
