"""Step time with rollouts that overlap training (max_staleness 1) against synchronous ones, on the quickstart task.

Both are `megatron-rl train configs/quickstart.yaml` with one trainer rank and one engine of one thread each, from the
same untrained small model. They alternate. Only the steps from the fourth to the last but one count: there the overlap
has begun and has not ended. `waited` is the time that the trainer waits for rollouts. The gain is at most the shorter
of rollout and training, and less on machines with fewer than two free cores. Prints a table, and one JSON line for
docs/benchmarks.md.

    python benchmarks/overlap.py [--steps 16 --repeat 3 --max-new-tokens 6 --staleness 1]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_rl.config import load_config
from megatron_rl.diagnostics.runlog import read_log
from megatron_rl.tiny_model import make_tiny_model

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
WARM, LAST = 3, 1  # steps left out at the beginning and at the end


def run(folder: Path, name: str, args: argparse.Namespace, staleness: int) -> dict[str, float]:
    """Train one run. Return medians over its steps in seconds, and its mean staleness."""
    settings = [
        f"model.path={folder / 'model'}",
        f"run.dir={folder}",
        f"run.name={name}",
        f"run.steps={args.steps}",
        "run.save_every=0",
        "parallel.tensor=1",
        "eval.prompts=0",
        f"rollout.max_staleness={staleness}",
        f"rollout.max_new_tokens={args.max_new_tokens}",
        f"rollout.timeout_s={600}",
    ]
    command = [sys.executable, "-m", "megatron_rl", "train", str(CONFIG), *settings]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    steps = [r for r in read_log(folder / name) if r["kind"] == "step"][WARM:-LAST]
    named = {"step": "seconds/total", "waited": "seconds/rollout", "update": "seconds/update", "sync": "seconds/sync"}
    return {name: statistics.median(r[key] for r in steps) for name, key in named.items()} | {
        "staleness": statistics.mean(r["staleness/mean"] for r in steps)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 16), ("repeat", 3), ("max-new-tokens", 6), ("staleness", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.steps < WARM + LAST + 1:
        parser.error(f"--steps {args.steps}: at least {WARM + LAST + 1} are needed")
    pairs = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        numbers = range(load_config(CONFIG).task.max_operand)
        make_tiny_model(folder / "model", [f"{a}+{b}={a + b}" for a in numbers for b in numbers], seed=0)
        for at in range(args.repeat):
            pairs.append([run(folder, f"{at}-{k}", args, k) for k in (0, args.staleness)])
    sync, overlapped = (
        {key: statistics.median(p[side][key] for p in pairs) for key in pairs[0][side]} for side in (0, 1)
    )
    ratio = statistics.median(slow["step"] / fast["step"] for slow, fast in pairs)
    print(f"{'median of a step, s':<22}{'synchronous':>14}{'overlapped':>14}")
    for key in ("step", "waited", "update", "sync", "staleness"):
        print(f"{key:<22}{sync[key]:>14.3f}{overlapped[key]:>14.3f}")
    print(f"synchronous / overlapped: {ratio:.3f}")
    print(
        json.dumps(
            {
                **vars(args),
                "cores": len(os.sched_getaffinity(0)),
                "ratio": ratio,
                "sync": sync,
                "overlapped": overlapped,
            }
        )
    )


if __name__ == "__main__":
    main()
