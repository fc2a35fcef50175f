"""Guard process: it runs one command and ends it, with every process that the command started, when the parent ends.

`python -I subreaper.py PARENT_PID COMMAND [ARGUMENT]...`. SGLang runs in several processes, and a killed trainer cannot
end them. The exit code is that of the command, or 128 + n if signal n ended it.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil

_POLL_S = 0.1
_GRACE_S = 3.0
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def run_guarded(parent_pid: int, command: list[str]) -> int:
    """Run the command until it ends, the parent ends, or SIGTERM arrives. Return its exit code.

    No process of the command is left running.
    """
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stops.append(number))
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):  # for the trainer alone; the command inherits this
        signal.signal(number, signal.SIG_IGN)
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if libc is not None:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)  # processes whose parent has ended become children of this process

    def die_with_the_guard() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    child = subprocess.Popen(command, preexec_fn=die_with_the_guard)  # noqa: PLW1509  (this process has one thread)
    try:
        # Poll the parent's id: a death signal would also come when the thread ends that started this process.
        while child.poll() is None and not stops and os.getppid() == parent_pid:
            time.sleep(_POLL_S)
        if stops and child.poll() is None:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(_GRACE_S)
    finally:
        _end_descendants()
    code = child.wait()
    return 128 - code if code < 0 else code


def _end_descendants() -> None:
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=1.0)


if __name__ == "__main__":
    sys.exit(run_guarded(int(sys.argv[1]), sys.argv[2:]))
