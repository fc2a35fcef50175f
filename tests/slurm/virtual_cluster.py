"""The virtual cluster of the tests: four nodes with networks of their own, and jobs whose roles are stand-ins."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rl.launch.conductor.control_files import ATTEMPTS, read_json, read_json_lines
from megatron_rl.launch.conductor.run_files import summarize
from megatron_rl.launch.submit import Request, submit_job

HERE = Path(__file__).parent
NODES = 4
# A slow machine may take longer for an answer than Slurm's own limit. Questions are then asked again.
_TRIES, _REPEATABLE = 5, ("scontrol", "sinfo", "squeue")
_BUSY = ("Socket timed out", "Unable to contact slurm controller")


class VirtualCluster:
    """Controls the cluster: nodes go away and come back, and Slurm is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, shared: list[Path]) -> None:
        script = HERE / "cluster" / "start.sh"
        done = subprocess.run([script, self.folder, str(NODES), *shared], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def stop(self) -> None:
        subprocess.run([HERE / "cluster" / "stop.sh", self.folder], check=False)

    def node(self, operation: str, *nodes: str) -> None:
        subprocess.run([HERE / "cluster" / "node.sh", operation, self.folder, *nodes], check=True)

    def inside(self, node: str, *command: str) -> None:
        """Run a command in the network and with the files of a node."""
        pid = (self.folder / "pids" / f"slurmd-{node}.pid").read_text().strip()
        subprocess.run(["nsenter", "-t", pid, "-n", "-m", *command], check=True)

    def ask(self, *command: str) -> str:
        """Return the output of a command. Fail with what it said if it fails."""
        for _ in range(_TRIES):
            done = self.attempt(*command)
            if done.returncode == 0:
                return done.stdout.strip()
            if command[0] not in _REPEATABLE or not any(words in done.stderr for words in _BUSY):
                break
        raise AssertionError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")

    def attempt(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command that may fail."""
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def controller_log(self, lines: int = 100) -> str:
        """Return the last lines of the log of Slurm's controller."""
        return "\n".join((self.folder / "log" / "slurmctld.log").read_text().splitlines()[-lines:])

    def until_idle(self) -> None:
        """Cancel what runs, and wait until all nodes are free."""
        for job in self.ask("squeue", "-h", "-o", "%A").split():
            self.attempt("scancel", job)  # it fails where the job has just ended
        wait_for(lambda: not self.ask("squeue", "-h"), "no job is left")
        wait_for(
            lambda: self.ask("sinfo", "-h", "-N", "-p", "batch", "-o", "%t") == "\n".join(["idle"] * NODES), "idle"
        )


def wait_for(condition: Callable[[], Any], what: str, patience: float = 120.0) -> Any:
    """Return the first true value of a condition. Fail after `patience` seconds."""
    deadline = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {patience} s in vain: {what}"
        time.sleep(0.1)
    return value


@dataclass
class FakeRun:
    """A run whose roles are stand-ins, by default on two nodes. Wishes say what they do."""

    cluster: VirtualCluster
    folder: Path
    model: Path
    name: str = "run"
    settings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.wishes.mkdir(parents=True)
        self.config.write_text(
            f"model: {{path: {self.model}}}\n"
            f"task: {{name: arithmetic}}\nrun: {{dir: {self.folder}, name: {self.name}, steps: 3}}\n"
        )

    @classmethod
    def at(cls, other: "FakeRun", name: str) -> "FakeRun":
        """Return the run of another name in the same folder, which somebody else submits."""
        made = object.__new__(cls)
        made.__dict__.update(other.__dict__, name=name)
        return made

    @classmethod
    def real(cls, cluster: VirtualCluster, folder: Path, name: str) -> "FakeRun":
        """Return a run whose roles are the product's own, which somebody else configures and submits."""
        made = object.__new__(cls)
        made.__dict__.update(cluster=cluster, folder=folder, name=name)
        return made

    @property
    def run(self) -> Path:
        return self.folder / self.name

    @property
    def wishes(self) -> Path:
        return self.folder / "wishes"

    @property
    def config(self) -> Path:
        return self.folder / "run.yaml"

    def wish(self, **values: object) -> None:
        """Write wishes; `_` in a name stands for `-` if it is not one of the trainer's own."""
        for name, value in values.items():
            own = name in ("steps", "step_s", "never_save")
            (self.wishes / (name if own else name.replace("_", "-"))).write_text(str(value))

    @property
    def stand_ins(self) -> list[str]:
        """Keys of the profile that make the roles stand-ins."""
        return [f"python={HERE / 'fake_python'}", f'env={{FAKE_ROLES: "{self.wishes}"}}']

    def submit(self, **options: Any) -> int:
        """Submit the run. Return the exit code of the command."""
        settings = [*self.stand_ins, *self.settings, *options.pop("settings", [])]
        overrides = options.pop("overrides", [])
        return submit_job(Request(self.config, overrides, "virtual", settings, **options))

    @property
    def job(self) -> str:
        return (read_json(str(self.run / "launch" / "submit.json")) or {})["jobs"][-1]

    def control(self, name: str) -> dict[str, Any] | None:
        return read_json(str(self.run / "control" / name))

    def result(self, patience: float = 120.0) -> dict[str, Any]:
        """Wait for the result of the run."""
        return self._wait_for(lambda: self.control("result.json"), "a result", patience)

    def attempts(self) -> list[dict[str, Any]]:
        return summarize(read_json_lines(str(self.run / "control" / ATTEMPTS)))

    def steps(self) -> list[int]:
        log = self.run / "log.jsonl"
        return [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.exists() else []

    def until_step(self, step: int) -> None:
        self._wait_for(lambda: step in self.steps(), f"step {step}")

    def until_attempt(self, number: int, patience: float = 120.0) -> dict[str, Any]:
        """Wait until an attempt has begun, counted from 1. Return what is known of it."""
        self._wait_for(lambda: len(self.attempts()) >= number, f"attempt {number}", patience)
        return self.attempts()[number - 1]

    def _wait_for(self, condition: Callable[[], Any], what: str, patience: float = 120.0) -> Any:
        """Wait as `wait_for` does. A failure shows what the conductor and Slurm say of the run."""
        try:
            return wait_for(condition, f"{what} of {self.run}", patience)
        except AssertionError as error:
            slurm = [self.cluster.attempt("scontrol", "show", kind).stdout for kind in ("job", "node")]
            raise AssertionError("\n".join([str(error), self.log(), *slurm, self.cluster.controller_log()])) from None

    def log(self) -> str:
        """Return what the conductor has said."""
        return "".join(path.read_text() for path in sorted((self.run / "logs").glob("sbatch-*.log")))


def cluster_at(folder: Path, shared: list[Path]) -> Iterator[VirtualCluster]:
    """Start a cluster, and stop it at the end."""
    cluster = VirtualCluster(folder)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        cluster.start(shared)
        yield cluster
    finally:
        cluster.stop()
        del os.environ["SLURM_CONF"]
