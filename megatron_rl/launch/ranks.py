"""Start the ranks of one run on this machine, and end all of them with the first that ends badly.

On a cluster `srun` or `torchrun` starts the ranks. Then this module starts none.

Without CUDA, a launcher with a single thread imports the training stack and forks the ranks. Otherwise every rank is
a new process that imports the stack itself: neither CUDA nor a second thread survives a fork.

Ranks lead sessions of their own, so that Ctrl-C reaches only the launcher. The launcher sends the signal to rank 0,
and the other ranks follow rank 0. If the launcher is killed, a watch process kills the ranks and everything they have
started: a run must not continue unnoticed.
"""

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from megatron_rl.engines.processes.fork_server import ForkServer, may_fork_servers
from megatron_rl.errors import ConfigError, ExitCode
from megatron_rl.forking import has_one_thread, like_new
from megatron_rl.launch.fork import ForkedProcess, fork_rank
from megatron_rl.launch.slurm_env import join_slurm_step
from megatron_rl.ports import free_port
from megatron_rl.supervise import kill_session, stops_blocked

MOST_RANKS = 1024  # on one machine
_SAID = (ExitCode.USER, ExitCode.RETRY, ExitCode.INTERRUPTED)  # exit codes of ranks that have printed why they end
_LAST_WORDS_S = 5.0  # time for the others to print why they end
_CLOSE_S = 60.0  # time for rank 0 to end its engines after a stop
SAME_STOP_S = 1.0  # one request may arrive twice: `timeout` and schedulers signal a process, then its group
# numpy's BLAS starts threads when it is imported, the tokenizers when they encode a batch.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# The watch reads one pid a line. Its input ends when the launcher ends for any reason.
_WATCH = """
import os, signal, sys
for pid in sys.stdin.readlines():
    try:
        os.killpg(int(pid), signal.SIGKILL)
    except ProcessLookupError:
        pass
"""

Worker = subprocess.Popen[bytes] | ForkedProcess


def under_launcher() -> bool:
    """Return True inside a rank, started by this module, by torchrun, or as one of several tasks of srun.

    Under srun, RANK and the other variables of a rank are set first. Raises ConfigError if they cannot be.
    """
    return "RANK" in os.environ or join_slurm_step()


@contextmanager
def one_thread() -> Iterator[None]:
    """Prevent libraries that are imported or used inside from starting threads, so that `run_ranks` can fork."""
    added = {name: value for name, value in _ONE_THREAD.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def run_ranks(arguments: list[str], ranks: int, *, forks_servers: bool = False) -> int:
    """Run `python -m megatron_rl ARGUMENTS` as `ranks` ranks. Return the first non-zero exit code, or 0.

    Args:
        arguments: arguments of the command line.
        ranks: number of ranks.
        forks_servers: rank 0 starts embedded servers; they are forked if this process can fork.

    Raises:
        ConfigError: there are more ranks than one machine can have.
    """
    if ranks > MOST_RANKS:
        raise ConfigError(
            f"parallel: tensor x pipeline x context x data = {ranks} ranks; one machine has at most {MOST_RANKS}: "
            "lower them, or start the ranks with torchrun or srun"
        )
    with one_thread():
        # It imports while this process does.
        server = ForkServer() if forks_servers and may_fork_servers() else None
        reset = prepare_fork()
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    if server is not None and reset is not None:  # only a forked rank inherits the socket
        shared |= server.environment
    default = "1" if ranks > 1 else str(os.cpu_count() or 1)
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", default)
    stops: list[float] = []
    asking = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup sets SIG_IGN, which must stay
        asking.append(signal.SIGHUP)
    previous = {number: signal.signal(number, lambda *_: stops.append(time.monotonic())) for number in asking}
    workers: list[Worker] = []
    with stops_blocked():
        watch = subprocess.Popen([sys.executable, "-I", "-c", _WATCH], stdin=subprocess.PIPE, start_new_session=True)
    pids = watch.stdin.fileno()  # type: ignore[union-attr]  # stdin is a pipe
    try:
        for rank in range(ranks):
            env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            if reset is not None:
                workers.append(fork_rank(arguments, env, pids, previous, reset))
                continue
            command = [sys.executable, "-m", "megatron_rl", *arguments]
            workers.append(subprocess.Popen(command, env=os.environ | env, start_new_session=True))
            os.write(pids, b"%d\n" % workers[-1].pid)
        return _wait(workers, stops)
    finally:
        _end(workers, at_once=False)
        if server is not None:
            server.close()
        watch.kill()
        watch.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def prepare_fork() -> Callable[[], None] | None:
    """Import the training stack if ranks can be forked from this process; otherwise return None.

    The result is the function that resets the stack in a forked rank.
    """
    if not has_one_thread():
        return None
    stack = importlib.import_module("megatron_rl.launch.stack")  # it imports torch, which `--help` does without
    return like_new if stack.import_stack() and has_one_thread() else None


def _wait(workers: Sequence[Worker], stops: list[float]) -> int:
    """Wait for all workers. Return the exit code of the run.

    When one fails, the others have some seconds to print why. `stops` are the times at which a stop was requested. They
    are handled here, because a signal handler may have interrupted anything.
    """
    asked = False
    while True:
        codes = [worker.poll() for worker in workers]
        if any(codes):
            # A rank that was killed is the cause. In the same moment others may already have failed because of it.
            failed = [(code > 0, rank) for rank, code in enumerate(codes) if code]
            return _end_of_run(workers, min(failed)[1], stops)
        if all(code == 0 for code in codes):
            return 0
        if stops and not asked:
            workers[0].send_signal(signal.SIGINT)
            asked = True
            with suppress(OSError):  # the terminal may be closed
                print(
                    "\nstopping: a checkpoint is written and the engines end (again to stop at once)",
                    file=sys.stderr,
                    flush=True,
                )
        if stops and stops[-1] - stops[0] > SAME_STOP_S:
            _end(workers, at_once=True)
        time.sleep(0.05)


def _end_of_run(workers: Sequence[Worker], rank: int, stops: list[float]) -> int:
    """Give the others time after rank `rank` has ended, print which rank failed, and return the run's exit code."""
    code = workers[rank].poll() or 0
    for limit_s, waited_for in ((_LAST_WORDS_S, workers), (_CLOSE_S, workers[:1])):
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and any(worker.poll() is None for worker in waited_for):
            time.sleep(0.05)
        if code != ExitCode.INTERRUPTED:  # after a stop, rank 0 leaves last
            break
    if code < 0 and stops:
        return ExitCode.INTERRUPTED
    if code < 0 or (len(workers) > 1 and code not in _SAID):
        with suppress(OSError):
            print(_obituary(rank, workers[rank].pid, code), file=sys.stderr, flush=True)
    return 128 - code if code < 0 else code


def _obituary(rank: int, pid: int, code: int) -> str:
    """Return the line that says how a rank ended. A negative code is a signal."""
    if code > 0:
        return f"rank {rank} (pid {pid}) failed first, with exit code {code}: other ranks end because of it"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = f"signal {-code}"
    hint = "; if nobody sent it, memory ran out (see dmesg)" if -code == signal.SIGKILL else ""
    return (
        f"rank {rank} (pid {pid}) was killed by {name}{hint}: the run ends, and errors of other ranks follow from "
        "that; go on with --resume"
    )


def _end(workers: Sequence[Worker], *, at_once: bool) -> None:
    """End the workers that still run. Rank 0 gets SIGTERM, because it owns engines. The others are killed."""
    for rank, worker in enumerate(workers):
        if worker.poll() is None:
            worker.send_signal(signal.SIGKILL if at_once or rank else signal.SIGTERM)
    deadline = time.monotonic() + (0 if at_once else 10)
    for worker in workers:
        try:
            worker.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.send_signal(signal.SIGKILL)
            worker.wait()
        kill_session(worker.pid)  # helpers of a rank that was killed: checkpoint writers and their manager
