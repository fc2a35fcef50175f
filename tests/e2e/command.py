"""The real command line runs in its own process. It is tracked and ended together with everything it starts."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_rl.diagnostics import read_log
from megatron_rl.diagnostics.log_keys import is_declared
from tests.e2e.zygote import ForkedCommand, Zygote
from tests.parallel.group import RANK_VARIABLES

ROOT = Path(__file__).resolve().parents[2]
TAG = "MEGATRON_RL_TEST_COMMAND"
FORKED = ("attribute", "eval", "serve", "study", "train", "warmup")
CAN_FORK = sys.platform.startswith("linux") and not torch.cuda.is_available()
PROMPTS = 8  # per step of the small run


@dataclass(frozen=True)
class Result:
    """The result of a command: exit code, stdout, stderr, and wall-clock seconds."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def all(self) -> str:
        """Exit code and output, for the messages of assertions."""
        return f"exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


@cache
def zygote() -> Zygote:
    """Return the process that forks commands; it ends with this one."""
    return Zygote()


class Command:
    """`python -m megatron_rl ARGUMENTS`. Its processes are found by its tag or by descent, also orphans.

    Commands of `FORKED` without environment variables of their own are forked from a process that has imported all.
    """

    def __init__(self, arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.tag = uuid.uuid4().hex
        env = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        paths = [environment.pop("PYTHONPATH", ""), str(ROOT)]
        env |= {
            "OMP_NUM_THREADS": "1",
            TAG: self.tag,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            **environment,
        }
        self.out, self.err = folder / f"{self.tag}.out", folder / f"{self.tag}.err"
        self.started = time.monotonic()
        self.process: subprocess.Popen[bytes] | ForkedCommand
        if (arguments[0] in FORKED or "--sync" in arguments) and not environment and CAN_FORK:
            self.process = zygote().start(arguments, folder, env, self.out, self.err)
            return
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatron_rl", *arguments], cwd=folder, env=env, stdout=out, stderr=err
            )

    def wait(self, timeout: float = 300) -> Result:
        """Return the result of the command. Fail if it does not end in time or leaves a process behind."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"the command did not end within {timeout} s\n{self._result(-1).all}") from None
        result = self._result(code)
        self.until_gone(self.members)
        return result

    def until(self, condition: Callable[[], Any], timeout: float = 180) -> Any:
        """Return the first true value of `condition`. Fail if the command ends before, or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not (value := condition()):
            running = self.process.poll() is None and time.monotonic() < deadline
            assert running or condition(), f"waited in vain\n{self._result(self.process.poll() or 0).all}"
            time.sleep(0.02)
        return value

    def until_gone(self, processes: Callable[[], list[psutil.Process]], patience: float = 10) -> None:
        """Fail if these processes still live `patience` seconds after the command. End all of its processes."""
        self.process.wait(patience)
        deadline = time.monotonic() + patience
        while (left := processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        names = [str(process) for process in left]
        self.end()
        assert not names, f"processes were left behind: {names}\n{self._result(self.process.returncode).all}"

    def interrupt(self) -> None:
        """Send Ctrl-C (SIGINT) to the command."""
        self.process.send_signal(signal.SIGINT)

    def members(self) -> list[psutil.Process]:
        """Return every living process of this command."""
        found = [process for process in psutil.process_iter() if _tag(process) == self.tag]
        if isinstance(self.process, ForkedCommand):
            found += [p for p in self.process.family() if p not in found and _tag(p) in (None, self.tag)]
        return found

    def servers(self) -> list[psutil.Process]:
        """Return the processes of the embedded servers of this command."""
        return [p for p in self.members() if is_server(p)]

    def rank(self, number: int) -> psutil.Process:
        """Return the trainer's process of a rank: a child of the command, with its rank in its name or in RANK."""
        for process in psutil.Process(self.process.pid).children():
            if process.name() == f"mrl-rank{number}" or process.environ().get("RANK") == str(number):
                return process
        raise AssertionError(f"rank {number} does not run\n{self._result(-1).all}")

    def end(self) -> None:
        """Kill every process of this command that still lives, by process id."""
        for process in self.members():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()

    def _result(self, code: int) -> Result:
        return Result(code, self.out.read_text(), self.err.read_text(), time.monotonic() - self.started)


def is_server(process: psutil.Process) -> bool:
    """Return whether a process is an embedded server of a run: a forked one, or a new process."""
    try:
        forked = process.name().startswith("mrl-serve-")
    except psutil.Error:  # it has ended meanwhile
        return False
    return forked or arguments_of(process)[1:4] == ["-m", "megatron_rl", "serve"]


def arguments_of(process: psutil.Process) -> list[str]:
    """Return the command line of a process, empty if it has ended meanwhile."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _tag(process: psutil.Process) -> str | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else process.environ().get(TAG)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def records(run: Path, kind: str = "step") -> list[dict[str, Any]]:
    """Return the records of this kind from the complete lines of a run's log."""
    log = run / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in found if record["kind"] == kind]


def assert_declared(run: Path) -> None:
    """Check that every key of a run's log is in the table of log keys, and so in docs/reference/metrics.md."""
    found = {key for record in read_log(run) for key in record}
    assert found and not {key for key in found if not is_declared(key)}


def assert_drawn_once(run: Path) -> None:
    """Check that every step consumed new draws: those it trained on, those it discarded and those it replaced."""
    before = 0
    for record in records(run):
        spent = record["rollout/drawn"] - before
        assert spent == PROMPTS + record["rollout/given_up"] + record["rollout/replaced"], record["step"]
        before = record["rollout/drawn"]


def assert_refused(result: Result, kind: str, *words: object) -> None:
    """Check that the only output is one paragraph on stderr, with this kind of error and these words."""
    assert result.code == 2, result.all
    paragraph = result.err.strip()
    assert paragraph.startswith(f"{kind}: ") and "\n" not in paragraph, result.all
    for word in words:
        assert str(word) in paragraph, result.all
    assert result.out == "", result.all
