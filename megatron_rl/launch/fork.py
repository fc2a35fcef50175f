"""A rank forked from the launcher: it runs as `python -m megatron_rl` would, but imports nothing a second time."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

from megatron_rl.forking import fork_as_command

_POLL_S = 0.02


class ForkedProcess:
    """A forked process, with those methods of `subprocess.Popen` that the launcher uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while the process runs."""
        if self._code is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # SIGCHLD is ignored, so the kernel keeps no exit code; Popen returns 0, too
                pid, status = self.pid, 0
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code. Raise subprocess.TimeoutExpired after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if timeout is not None and deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(_POLL_S)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def fork_rank(
    arguments: list[str],
    environment: Mapping[str, str],
    pids: int,
    handlers: Mapping[signal.Signals, Any],
    like_new: Callable[[], None],
) -> ForkedProcess:
    """Fork a process that runs `python -m megatron_rl ARGUMENTS` in a session of its own.

    The calling process must have one thread. In `ps` and `top` the rank is called `mrl-rank<RANK>`.

    Args:
        arguments: arguments of the command line.
        environment: variables of the rank in addition to the launcher's, among them RANK.
        pids: file descriptor, to which the rank writes its pid and a newline as soon as it leads its session.
        handlers: the handler, in the rank, of each signal that the launcher handles.
        like_new: called in the rank; it resets state of imported libraries that a new process would not have.
    """

    def begin() -> None:
        os.write(pids, b"%d\n" % os.getpid())
        os.close(pids)  # the watch waits for the end of its input, so only the launcher may hold it open

    name = f"mrl-rank{environment['RANK']}"
    return ForkedProcess(fork_as_command(arguments, environment, name, handlers, begin, like_new))
