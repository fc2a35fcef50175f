"""Processes that end with their parent, and sessions that end as a whole. Linux only where noted (prctl)."""

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from megatron_rl.errors import UserError

# They ask a run to stop. A scheduler sends them to every process of a job, and rank 0 alone decides what follows.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1
_GRACE_S = 5.0


class Leader(Protocol):
    """A process that leads its own session: a `subprocess.Popen`, or a forked process with the same methods."""

    pid: int

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code. Raise subprocess.TimeoutExpired after `timeout` seconds."""
        ...

    def send_signal(self, number: int, /) -> None:
        """Send a signal, if it runs."""
        ...


def block_stops() -> None:
    """Block the signals that ask for a stop, in this thread and in everything that it starts from now on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def ignore_stops() -> None:
    """Ignore the signals that ask for a stop, in all threads of this process, also while its interpreter ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def stops_blocked() -> Iterator[None]:
    """Let processes that are started inside never see a signal that asks for a stop: the run needs them to the end."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def die_with_parent(parent_pid: int) -> None:
    """Make the kernel kill this process when its parent ends. Linux only.

    The kernel sends the signal when the thread that started this process ends, so that must be the main thread.
    Raises UserError on another system, or if `parent_pid` is not the parent.
    """
    if not sys.platform.startswith("linux"):
        raise UserError("--parent-pid needs Linux (prctl PR_SET_PDEATHSIG)")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise UserError(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent_pid:
        raise UserError(f"process {parent_pid} is not the parent (any more)")


def kill_session(leader: int) -> None:
    """Kill every process in the process group of session leader `leader`."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def end_sessions(leaders: Sequence[Leader], grace_s: float = _GRACE_S, number: int = signal.SIGTERM) -> None:
    """End processes that lead their own sessions, and every other process of these sessions.

    Args:
        leaders: processes that get the signal.
        grace_s: seconds for all of them to end; then their sessions are killed.
        number: the signal.
    """
    for process in leaders:
        if process.poll() is None:
            process.send_signal(number)
    deadline = time.monotonic() + grace_s
    for process in leaders:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(deadline - time.monotonic(), 0.0))
        kill_session(process.pid)
        process.wait()


def raise_file_limit() -> int:
    """Raise this process's limit of open files as far as it may, and return it. Every connection is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return 1 << 20 if hard == resource.RLIM_INFINITY else hard
