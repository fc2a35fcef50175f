"""Steps of this trainer against those of TRL's GRPOTrainer: same model, prompts, reward, updates, learning rate, dtype.

All trainers run at the same time, and all but one are stopped (SIGSTOP). Each has a turn of some steps, in rotation, so
that what else the machine does affects all of them. The step in which a turn begins is not counted. TRL computes old
log-probabilities of all sampled tokens in a pass before the updates; this trainer does not for the first update, whose
own pass gives them. Prints a table; with --json a line for docs/benchmarks.md.

    make peers      # or: python benchmarks/peers.py --trl .venv-peers/bin/python [--model MODEL --new-tokens 6]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from products import products_seconds

LIMIT_S = 600.0  # until a trainer has made the steps of a turn
VARIANTS = {
    "tp1": {},
    "tp2": {"parallel.tensor": 2},
    "dp2, 2 servers": {"parallel.data": 2, "rollout.servers": 2},
    "tp1, staleness 1": {"rollout.max_staleness": 1},
}


@dataclass
class Trainer:
    """A trainer that runs in turns.

    Attributes:
        name: its name in the table.
        log: file that gets a line per step.
        process: the first process of its tree.
        seconds: wall-clock seconds of a step, for each turn.
        cpu: CPU seconds of a step, for each turn.
        memory: largest proportional set size of all its processes at the end of a turn, in bytes.
    """

    name: str
    log: Path
    process: psutil.Popen
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    memory: int = 0

    def tree(self) -> list[psutil.Process]:
        """Return all processes of this trainer that live."""
        return [self.process, *self.process.children(recursive=True)]

    def steps(self) -> list[dict[str, Any]]:
        """Return the records of complete steps."""
        lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [record for record in found if record.get("kind", "step") == "step"]

    def turn(self, count: int) -> None:
        """Run one step that is not counted, and then `count` steps."""
        _each(self.tree(), psutil.Process.resume)
        done = len(self.steps())
        start, used = self._reach(done + 1), _cpu_seconds(self.tree())
        end = self._reach(done + 1 + count)
        self.seconds.append((end - start) / count)
        self.cpu.append((_cpu_seconds(self.tree()) - used) / count)
        self.memory = max(self.memory, sum(process.memory_full_info().pss for process in self.tree()))
        _each(self.tree(), psutil.Process.suspend)

    def _reach(self, steps: int) -> float:
        """Wait for that many steps. Return the time."""
        limit = time.monotonic() + LIMIT_S
        size = -1
        while time.monotonic() < limit:
            if self.process.poll() is not None:
                sys.exit(f"{self.name} ended with code {self.process.returncode}; see {self.log.parent}")
            now = self.log.stat().st_size if self.log.exists() else 0
            if now != size and len(self.steps()) >= steps:
                return time.monotonic()
            size = now
            time.sleep(0.002)
        sys.exit(f"{self.name} made no {steps} steps within {LIMIT_S:.0f} s; see {self.log.parent}")

    def end(self) -> None:
        """Kill every process of the trainer."""
        _each(self.tree(), psutil.Process.kill)
        self.process.wait()


def _each(processes: Sequence[psutil.Process], call: Any) -> None:
    for process in processes:
        try:
            call(process)
        except psutil.NoSuchProcess:
            continue


def _cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def start_ours(name: str, more: dict[str, Any], args: argparse.Namespace, folder: Path) -> Trainer:
    """Start a run of this trainer."""
    keys = {
        "model.path": args.model.absolute(),
        "precision.train": "fp32",
        "rollout.prompts_per_step": args.prompts,
        "rollout.samples_per_prompt": args.samples,
        "rollout.max_prompt_tokens": 8,
        "rollout.max_new_tokens": args.new_tokens,
        "objective": "{name: grpo, advantage: grpo, norm: token_mean, ratio_denominator: trainer_old}",
        "optimizer.lr": args.lr,
        "optimizer.beta2": 0.99,
        "optimizer.warmup_updates": 0,
        "optimizer.updates_per_step": args.updates,
        "task": "{name: arithmetic, max_operand: 50, held_out: 128}",
        "eval.every": 0,
        "run": f"{{name: run, dir: {folder}, steps: 100000, save_every: 0, loggers: []}}",
    } | more
    folder.mkdir(parents=True)
    empty = folder / "empty.yaml"
    empty.write_text("")
    command = [
        sys.executable,
        "-m",
        "megatron_rl",
        "train",
        str(empty),
        *(f"{key}={value}" for key, value in keys.items()),
    ]
    return Trainer(name, folder / "run/log.jsonl", _start(command, folder, args.threads))


def start_trl(args: argparse.Namespace, folder: Path) -> Trainer:
    """Start TRL's trainer."""
    folder.mkdir(parents=True)
    sizes = {name: getattr(args, name) for name in ("prompts", "samples", "new_tokens", "updates", "lr", "threads")}
    log = folder / "log.jsonl"
    script = Path(__file__).with_name("peers_trl.py")
    command = [str(args.trl), str(script), str(args.model.absolute()), json.dumps(sizes), str(log)]
    return Trainer("TRL", log, _start(command, folder, args.threads))


def _start(command: list[str], folder: Path, threads: int) -> psutil.Popen:
    output = (folder / "output.txt").open("w")
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    return psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True, help="Python of an environment that holds TRL")
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart-models/warm"))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=6)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="counted steps of a turn")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        trainers = []
        for variant in [None, *args.variants]:
            if variant is None:
                trainer = start_trl(args, folder / "trl")
            else:
                trainer = start_ours(
                    variant, VARIANTS[variant], args, folder / variant.replace(", ", "-").replace(" ", "-")
                )
            stack.callback(trainer.end)
            trainer.turn(1)  # start-up, one after the other
            trainers.append(trainer)
        for trainer in trainers:
            trainer.seconds.clear()
            trainer.cpu.clear()
        for _ in range(args.turns):
            for trainer in trainers:
                trainer.turn(args.steps)
        report(trainers, args)


def report(trainers: Sequence[Trainer], args: argparse.Namespace) -> None:
    """Print medians over turns, and the median of each turn's ratio to TRL."""
    trl = trainers[0]
    table = []
    print(f"{'trainer':20} {'s/step':>8} {'to TRL':>8} {'CPU s':>8} {'memory':>10} {'reward':>8} {'steps':>6}")
    for trainer in trainers:
        steps = trainer.steps()
        rewards = [step["reward/mean"] if "reward/mean" in step else step["reward"] for step in steps]
        row = {
            "trainer": trainer.name,
            "seconds": statistics.median(trainer.seconds),
            "ratio": statistics.median(a / b for a, b in zip(trainer.seconds, trl.seconds, strict=True)),
            "cpu": statistics.median(trainer.cpu),
            "bytes": trainer.memory,
            "reward": statistics.mean(rewards[-10:]),
            "steps": len(steps),
        }
        table.append(row)
        print(
            f"{row['trainer']:20} {row['seconds']:8.3f} {row['ratio']:8.2f} {row['cpu']:8.3f} "
            f"{row['bytes'] / 2**20:7.0f} MB {row['reward']:8.3f} {row['steps']:6}"
        )
    rows = args.prompts * args.samples
    alone = products_seconds(
        args.model, rows=rows, new_tokens=args.new_tokens, updates=args.updates, threads=args.threads
    )
    print(f"matrix products of a step alone, {args.threads} threads: {alone:.3f} s")
    for trainer in trainers[1:]:
        parts = ", ".join(f"{name} {_median_of(trainer, name):.3f}" for name in ("rollout", "batch", "update", "sync"))
        print(f"seconds of a step, {trainer.name}: {parts}")
    if args.json:
        sizes = {"new_tokens": args.new_tokens, "threads": args.threads}
        print(json.dumps(sizes | {"products": alone, "trainers": table}))


def _median_of(trainer: Trainer, phase: str) -> float:
    return statistics.median(step[f"seconds/{phase}"] for step in trainer.steps())


if __name__ == "__main__":
    main()
