"""A process that has imported everything once and forks the commands of end-to-end tests: a start costs no import.

A forked command runs `python -m megatron_rl ARGUMENTS` as the launcher's ranks do. Commands with environment variables
of their own, and the commands whose start is the question, are new processes: see `Command`.
"""

import ctypes
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import psutil

ROOT = Path(__file__).resolve().parents[2]
_PR_SET_CHILD_SUBREAPER = 36
_STACK = (
    "megatron_rl.cli",
    "megatron_rl.launch.stack",
    "megatron_rl.algorithms",
    "megatron_rl.trainer.attribution",
    "megatron_rl.trainer.evaluate",
    "megatron_rl.sft",
    "megatron_rl.study.run_study",
    "megatron_rl.server.app",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
)
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


class Zygote:
    """The process, for the tests' side."""

    def __init__(self) -> None:
        env = os.environ | _ONE_THREAD | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.zygote"], env=env, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.commands: list[ForkedCommand] = []
        self._lock = threading.Lock()

    def ask(self, **request: Any) -> Any:
        """Send a request and return the response. Called from any thread."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with self._lock:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())

    def start(self, arguments: list[str], cwd: Path, env: dict[str, str], out: Path, err: Path) -> "ForkedCommand":
        """Fork a command. `out` and `err` receive its output."""
        pid = self.ask(op="start", arguments=arguments, cwd=str(cwd), env=env, out=str(out), err=str(err))
        self.commands.append(ForkedCommand(self, pid))
        return self.commands[-1]


class ForkedCommand:
    """A forked command, with those methods of `subprocess.Popen` that tests use."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self.zygote, self.pid = zygote, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.zygote.ask(op="poll", pid=self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"command {self.pid}", timeout or 0)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def family(self) -> list[psutil.Process]:
        """Return the living processes of this command, with those whose parents have ended."""
        found = []
        others = {c.pid for c in self.zygote.commands if c is not self}
        for child in psutil.Process(self.zygote.process.pid).children():
            if child.pid not in others:
                found += [child, *_descendants(child)]
        return [process for process in found if _lives(process)]


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _serve() -> None:
    """Read requests from stdin until it closes, and write a line for each."""
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of commands stay in sight
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in _STACK:
        importlib.import_module(name)
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked"
    ended: dict[int, int] = {}
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if request["op"] == "start":
            answer: Any = os.fork() or _become(request)
        else:
            _reap(ended)
            answer = ended.get(request["pid"])
        os.write(answers, json.dumps(answer).encode() + b"\n")


def _reap(ended: dict[int, int]) -> None:
    """Note the exit codes of children that have ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        ended[pid] = os.waitstatus_to_exitcode(status)


def _become(request: dict[str, Any]) -> NoReturn:
    """Run the command in this forked process, and end it."""
    from megatron_rl import forking  # imported by now

    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        for number, name in ((1, request["out"]), (2, request["err"])):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        forking.like_new()
        code = forking.run_as_command(request["arguments"])
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


if __name__ == "__main__":
    _serve()
