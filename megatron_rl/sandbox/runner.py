"""Running Python code of a model in a jail: no network, none of our files, bounded time, memory, output, processes."""

import functools
import logging
import marshal
import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any, Literal

from megatron_rl.errors import ConfigError
from megatron_rl.sandbox.interpreter import FLAGS, Interpreter, interpreter
from megatron_rl.sandbox.seccomp import filter_program

_log = logging.getLogger(__name__)

Way = Literal["bwrap", "namespaces", "unsafe"]
Reason = Literal["", "timeout", "memory", "output", "error"]

_JAIL = Path(__file__).with_name("jail.py")
# The interpreter starts with this program and reads the rest, which is compiled once, from its standard input.
_BOOT = """# megatron_rl: code of a model, in a jail
import marshal, os, sys
left, parts = int(os.read(0, 8)), []
while left:
    parts.append(os.read(0, left) or sys.exit("the trainer is gone"))
    left -= len(parts[-1])
request, program = marshal.loads(b"".join(parts)), {"__name__": "jail"}
exec(request["program"], program)
program["main"](request, int(sys.argv[1]))
"""
FOLDER = "/work"  # working folder of the code inside a jail
FILE_BYTES = 16 << 20
MOST_CODE = 16 << 20  # characters of one block
PROCESSES = 32  # threads of the code, plus the two processes around it
MEMORY_EXIT = 86
_START_S = 30.0  # seconds beyond the code's own time, for a jail to start on a busy machine
_END_S = 2.0


@dataclass(frozen=True, slots=True)
class Result:
    """Result of a block of code.

    Attributes:
        output: what the code wrote to standard output and error, tracebacks included; at most `output_bytes` of it.
        ok: True if the code ended by itself, without an exception.
        reason: why the code is not ok; empty if it is.
        seconds: wall-clock time, without the start of the jail.
    """

    output: str
    ok: bool
    reason: Reason
    seconds: float


class Sandbox:
    """Sandbox: runs blocks of code, each in its own process and folder. Nothing of them stays. Threads may share it.

    As many blocks run at once as there are CPUs. The others wait, and their time starts when they run.

    Args:
        way: how the jail is made, from `select.find_jail` or `select.allow_unsafe`.
        seconds: wall-clock limit of one block, which may use as much CPU time.
        memory_mb: address space of the code beyond the interpreter's own, in MiB.
        output_bytes: the code is ended after this many bytes of output.
    """

    def __init__(self, way: Way, *, seconds: float, memory_mb: int, output_bytes: int = 1 << 16) -> None:
        self.way, self.seconds, self.memory_mb, self.output_bytes = way, seconds, memory_mb, output_bytes
        self._gate = threading.BoundedSemaphore(len(os.sched_getaffinity(0)))

    def run(self, code: str) -> Result:
        """Run one block of code. Whatever the code does is in the result.

        Raises ConfigError if the jail itself fails twice.
        """
        with self._gate:
            try:
                return self._run(code)
            except ConfigError as error:
                # `find_jail` has tested this way to make a jail. A machine that lacks a resource for a moment must not
                # end the run.
                _log.warning("%s: one more try", error)
                return self._run(code)

    def _run(self, code: str) -> Result:
        return run_block(self.way, code, seconds=self.seconds, memory_mb=self.memory_mb, output_bytes=self.output_bytes)


# One block of code -------------------------------------------------------------------------------------------


def run_block(way: Way, code: str, *, seconds: float, memory_mb: int, output_bytes: int) -> Result:
    """Run one block of code in its own jail.

    Args:
        way: as in `Sandbox`.
        code: the block of code.
        seconds: as in `Sandbox`.
        memory_mb: as in `Sandbox`.
        output_bytes: as in `Sandbox`.
    """
    if len(code) > MOST_CODE:
        text = f"the block has {len(code)} characters; at most {MOST_CODE} are run"
        return Result(text, False, "error", 0.0)
    python = interpreter()
    request: dict[str, Any] = {
        "way": way,
        "program": _program(),
        "code": code,
        "seconds": seconds,
        "memory_bytes": python.own_bytes + (memory_mb << 20),
        "file_bytes": FILE_BYTES,
        # Without a user namespace, the limit would count all processes of the user.
        "processes": 0 if way == "unsafe" else PROCESSES,
        "memory_exit": MEMORY_EXIT,
        "filter": (filter_program() or b"").hex(),
        "folder": FOLDER,
    }
    if way == "unsafe":
        with tempfile.TemporaryDirectory(prefix="megatron-rl-tool-", ignore_cleanup_errors=True) as folder:
            return _read(way, python, request | {"folder": folder}, output_bytes)
    return _read(
        way, python, request | {"binds": python.binds, "links": python.links, "hidden": python.hidden}, output_bytes
    )


@functools.cache
def _program() -> CodeType:
    return compile(_JAIL.read_bytes(), str(_JAIL), "exec")


def _read(way: Way, python: Interpreter, request: dict[str, Any], output_bytes: int) -> Result:
    verdict_end, report = os.pipe()
    try:
        command = [*(_bwrap(python) if way == "bwrap" else []), python.path, *FLAGS, "-c", _BOOT, str(report)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=python.environment,
            cwd="/",
            pass_fds=(report,),
            start_new_session=True,
            bufsize=0,
        )
    except OSError as error:
        os.close(verdict_end)
        raise ConfigError(f"the sandbox did not start ({way}): {error}") from error
    finally:
        os.close(report)
    try:
        talk = _Talk(process, verdict_end, request, output_bytes)
        talk.until(time.monotonic() + request["seconds"] + _START_S)
    finally:
        _end(process)
        os.close(verdict_end)
    return talk.result(way)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Close the input of a jail, which ends it. If it does not end in time, kill it with its whole process group."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    deadline = time.monotonic() + _END_S
    # All processes of the jail hold the other end of this pipe. `wait` with a timeout sleeps between its checks; this
    # does not.
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())) and process.stdout.read(1 << 16):
            pass
    process.stdout.close()
    try:
        process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class _Talk:
    """Exchange with one jail: sends the request, reads output and verdict. The size of both is bounded."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", verdict_end: int, request: dict[str, Any], output_bytes: int
    ) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._stdin, self._stdout, self._verdict_end = process.stdin, process.stdout.fileno(), verdict_end
        body = marshal.dumps(request)
        # A view: without it, every write would copy the rest.
        self._unsent, self._most = memoryview(b"%08d" % len(body) + body), output_bytes
        self._output, self._verdict = bytearray(), b""
        self._cut = self._over = False
        self._seconds, self._late = float(request["seconds"]), False

    def until(self, deadline: float) -> None:
        """Send and read until the verdict, the end of the process, or the deadline."""
        started = time.monotonic()
        for descriptor in (self._stdin.fileno(), self._stdout, self._verdict_end):
            os.set_blocking(descriptor, False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdin, selectors.EVENT_WRITE, self._send)
            selector.register(self._stdout, selectors.EVENT_READ, self._hear)
            selector.register(self._verdict_end, selectors.EVENT_READ, self._conclude)
            while not self._over and (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    if not key.data():
                        selector.unregister(key.fileobj)
        self._over = True
        while self._hear():
            pass
        seconds = time.monotonic() - started
        self._seconds, self._late = seconds, seconds > self._seconds

    def _send(self) -> bool:
        """Send a part of the request. Return True if there is more to send."""
        try:
            self._unsent = self._unsent[os.write(self._stdin.fileno(), self._unsent) :]
        except BrokenPipeError:
            return False
        return len(self._unsent) > 0

    def _hear(self) -> bool:
        """Read a part of the output. Return True if there may be more. End the jail if the output is over the bound."""
        if self._cut:
            return False
        try:
            data = os.read(self._stdout, 1 << 16)
        except BlockingIOError:
            return not self._over
        self._output += data
        if len(self._output) > self._most:
            self._cut = True
            with suppress(BrokenPipeError):
                self._stdin.close()
        return bool(data) and not self._cut

    def _conclude(self) -> bool:
        data = os.read(self._verdict_end, 1 << 12)
        self._verdict += data
        self._over = not data or (self._verdict.endswith(b"\n") and self._verdict != b"begun\n")
        return not self._over

    def result(self, way: Way) -> Result:
        output = self._output[: self._most].decode(errors="ignore" if self._cut else "replace")
        told = [line.partition(" ") for line in self._verdict.decode().splitlines()]
        ended = [rest for word, _, rest in told if word == "ended"]
        broken = [rest for word, _, rest in told if word == "broken"]
        if broken or not told:
            why = "; ".join(broken) or output.strip()[-300:] or f"it did not begin within {_START_S:g} s"
            raise ConfigError(f"the sandbox failed ({way}): {why}")
        late, status, seconds = self._late, 1, self._seconds
        # Without this report, the code has ended its guard. It must not end the run.
        if ended:
            words = ended[0].split()
            late, status, seconds = words[0] == "1", int(words[1]), float(words[2])
        reason: Reason = "output" if self._cut else _reason(late, status)
        return Result(output, reason == "", reason, seconds)


def _reason(late: bool, status: int) -> Reason:
    if late or status == -signal.SIGXCPU:
        return "timeout"
    # Within the time, only the kernel kills the code, when memory runs out.
    if status in (MEMORY_EXIT, -signal.SIGKILL):
        return "memory"
    return "error" if status else ""


def _bwrap(python: Interpreter) -> list[str]:
    command = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-user",
        "--unshare-ipc",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-uts",
    ]
    command += ["--die-with-parent", "--new-session", "--as-pid-1", "--hostname", "jail"]
    command += ["--uid", "1000", "--gid", "1000", "--cap-drop", "ALL"]
    for source, target in [*python.binds, (python.path, python.path)]:
        command += ["--dev-bind" if target.startswith("/dev/") else "--ro-bind", source, target]
    for target in python.hidden:
        command += ["--tmpfs", target, "--remount-ro", target]
    for target, text in python.links:
        command += ["--symlink", text, target]
    command += ["--perms", "0700", "--size", str(FILE_BYTES), "--tmpfs", FOLDER, "--remount-ro", "/", "--chdir", FOLDER]
    return [*command, "--"]
