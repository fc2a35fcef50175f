"""Start the ranks of one run on this machine, and end all of them with the first that ends badly.

On a cluster `srun` or `torchrun` starts the ranks; then RANK is set and this is not used. Workers get sessions of
their own, so that Ctrl-C reaches the parent alone, which asks rank 0 to stop; the other ranks follow rank 0. Should the
parent be killed, a watch ends the workers with all they have started: a run must not go on unseen.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

SAME_STOP_S = 1.0  # one request may arrive twice: `timeout` and schedulers signal a process and then its group
# Reads one pid a line. The end of its input is the end of the launcher, however that came.
_WATCH = """
import os, signal, sys
for pid in sys.stdin.readlines():
    try:
        os.killpg(int(pid), signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


def under_launcher() -> bool:
    """True inside a rank that somebody started (ourselves, torchrun or srun with RANK exported)."""
    return "RANK" in os.environ


def run_ranks(arguments: list[str], ranks: int) -> int:
    """Run `python -m megatron_rl ARGUMENTS` as `ranks` ranks; answers the exit code (the first non-zero one, if any)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared.setdefault("OMP_NUM_THREADS", "1" if ranks > 1 else str(os.cpu_count() or 1))
    stops: list[float] = []
    asking = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
        asking.append(signal.SIGHUP)
    previous = {number: signal.signal(number, lambda *_: stops.append(time.monotonic())) for number in asking}
    workers: list[subprocess.Popen[bytes]] = []
    watch = subprocess.Popen([sys.executable, "-I", "-c", _WATCH], stdin=subprocess.PIPE, start_new_session=True)
    try:
        for rank in range(ranks):
            env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            workers.append(
                subprocess.Popen([sys.executable, "-m", "megatron_rl", *arguments], env=env, start_new_session=True)
            )
            os.write(watch.stdin.fileno(), b"%d\n" % workers[-1].pid)  # type: ignore[union-attr]  # it is a pipe
        return _wait(workers, stops)
    finally:
        _end(workers, at_once=False)
        watch.kill()
        watch.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(workers: list[subprocess.Popen[bytes]], stops: list[float]) -> int:
    """Wait for all; when one ends badly, give the others a moment to say why.

    stops: times at which a stop was asked for. Acted on here, since a signal handler may have interrupted anything.
    """
    asked = False
    while True:
        codes = [worker.poll() for worker in workers]
        failed = [code for code in codes if code]
        if failed:
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline and any(worker.poll() is None for worker in workers):
                time.sleep(0.05)
            killed = 130 if stops else 128 - failed[0]
            return killed if failed[0] < 0 else failed[0]
        if all(code == 0 for code in codes):
            return 0
        if stops and not asked:
            workers[0].send_signal(signal.SIGINT)
            asked = True
            with suppress(OSError):  # the terminal may be what is gone
                print(
                    "\nstopping: a checkpoint is written and the engines end (again to stop at once)",
                    file=sys.stderr,
                    flush=True,
                )
        if stops and stops[-1] - stops[0] > SAME_STOP_S:
            _end(workers, at_once=True)
        time.sleep(0.05)


def _end(workers: list[subprocess.Popen[bytes]], *, at_once: bool) -> None:
    """End what still runs: rank 0 is asked, since it owns engines; the others only follow it, and are killed."""
    for rank, worker in enumerate(workers):
        if worker.poll() is None:
            worker.send_signal(signal.SIGKILL if at_once or rank else signal.SIGTERM)
    deadline = time.monotonic() + (0 if at_once else 10)
    for worker in workers:
        try:
            worker.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        with suppress(ProcessLookupError):  # helpers of a rank that was killed: checkpoint writers and their manager
            os.killpg(worker.pid, signal.SIGKILL)
