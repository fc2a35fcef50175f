"""Share of the weights that change from one step to the next, as engines see them: is a delta update worth it?

Each run is `configs/quickstart.yaml` from the warm model of `make quickstart`, with one update a step. After every step
the export for the engines is compared with that of the step before, byte by byte. Prints a table, and one JSON line for
docs/benchmarks.md.

    python benchmarks/changed.py [--model MODEL --steps 12 --lr 1e-6 1e-5 4e-4 --rollout bf16 fp8_blockwise]
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.algorithms import make_algorithm
from megatron_rl.config import load_config
from megatron_rl.trainer.bringup import open_run
from megatron_rl.trainer.loop import train
from megatron_rl.trainer.metrics import Stopwatch
from megatron_rl.trainer.trainer import Trainer

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"


class Comparison:
    """Hook that compares the weights before and after each step."""

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}
        self.shares: list[dict[str, float]] = []

    def before_step(self, trainer: Trainer) -> None:
        """Export the weights that the step starts from."""
        self.before = _export(trainer)

    def before_publish(self, trainer: Trainer, watch: Stopwatch) -> list[dict[str, Any]]:
        """Note what has changed. Return no record."""
        changed = {name: _changed(self.before[name], after) for name, after in _export(trainer).items()}
        size = sum(len(flags) for flags in changed.values())
        self.shares.append(
            {
                "bytes": sum(int(flags.sum()) for flags in changed.values()) / size,
                "tensors": sum(len(flags) for flags in changed.values() if flags.any()) / size,
            }
        )
        return []


def _export(trainer: Trainer) -> dict[str, Tensor]:
    stream = trainer.policy.export(trainer.plan.precision)
    return {name: tensor.clone() for name, tensor in stream if tensor is not None}


def _changed(before: Tensor, after: Tensor) -> Tensor:
    """Return a flag for each byte of a tensor."""
    return before.contiguous().view(-1).view(torch.uint8) != after.contiguous().view(-1).view(torch.uint8)


def measure(folder: Path, model: Path, lr: float, rollout: str, steps: int) -> dict[str, float]:
    """Return medians over the steps after the first, whose moments are those of one gradient."""
    settings = [
        f"model.path={model}",
        f"run={{dir: {folder}, name: 'lr-{lr}-{rollout}', steps: {steps}, save_every: 0, loggers: []}}",
        "parallel.tensor=1",
        "eval.prompts=0",
        f"optimizer.lr={lr}",
        "optimizer.updates_per_step=1",
        "optimizer.warmup_updates=0",
        "precision.train=bf16",
        f"precision.rollout={rollout}",
    ]
    comparison = Comparison()
    config = load_config(CONFIG, settings)
    with open_run(config, resume=False) as trainer:
        train(trainer, make_algorithm(trainer.plan.algorithm), [comparison])
    if not any(share["bytes"] for share in comparison.shares):
        raise SystemExit(f"{model} is never rewarded, so it learns nothing: give a model that is")
    return {key: statistics.median(share[key] for share in comparison.shares[1:]) for key in ("bytes", "tensors")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart-models/warm"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-6, 1e-5, 4e-4])
    parser.add_argument("--rollout", nargs="+", default=["bf16", "fp8_blockwise"])
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for rollout in args.rollout:
            for lr in args.lr:
                found = measure(Path(place), args.model.absolute(), lr, rollout, args.steps)
                rows.append({"rollout": rollout, "lr": lr, **found})
    print(f"{'rollout':<16}{'lr':>8}{'bytes changed':>16}{'bytes of changed tensors':>28}")
    for row in rows:
        print(f"{row['rollout']:<16}{row['lr']:>8g}{row['bytes']:>16.2%}{row['tensors']:>28.1%}")
    print(json.dumps({"steps": args.steps, "rows": rows}))


if __name__ == "__main__":
    main()
