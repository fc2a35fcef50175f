"""Long-lived groups of ranks: processes that join one gloo world once and run many checks inside it."""

import faulthandler
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any

import psutil

from megatron_rl.ports import free_port

STUCK = signal.SIGUSR1
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Of one rank. A deleted policy leaves some gloo groups behind, and each of their threads wakes up a hundred times a
# second. With a thousand of them, two cores do little else.
THREADS = 250


def _imported(module: str) -> ModuleType:
    """Import a module for good: collections do not walk its objects and those of what it imports, half a million."""
    if module in sys.modules:
        return sys.modules[module]
    found = importlib.import_module(module)
    gc.freeze()
    return found


def _serve(rank: int, world: int, port: int, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    import torch

    torch.set_num_threads(1)
    faulthandler.register(STUCK, all_threads=False)
    while True:
        gc.collect()  # models of the last check hold each other, and with them the threads of its process groups
        try:
            module, function, kwargs = pipe.recv()
        except EOFError:
            gc.unfreeze()  # libraries report objects that the interpreter's end does not collect
            return
        try:
            pipe.send(("ok", getattr(_imported(module), function)(**kwargs)))
        except BaseException as error:  # noqa: BLE001  a rank's process boundary
            pipe.send(("error", f"rank {rank}: {type(error).__name__}: {error}\n{traceback.format_exc()}"))


class RankGroup:
    """`run(module, function, **kwargs)` calls the function on every rank and answers the list of results."""

    def __init__(self, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, port, theirs))
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, module: str, function: str, timeout: float = 240, **kwargs: Any) -> list[Any]:
        if max(psutil.Process(process.pid).num_threads() for process in self.processes) > THREADS:
            self._restart()
        for pipe in self.pipes:
            pipe.send((module, function, kwargs))
        answers: dict[Connection, Any] = {}
        deadline, errors = time.monotonic() + timeout, []
        while len(answers) < len(self.pipes):
            ready = wait([p for p in self.pipes if p not in answers], max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                status, answers[pipe] = pipe.recv()
                if status == "error":
                    errors.append(answers[pipe])
                    deadline = min(deadline, time.monotonic() + 5)  # the others may wait for the failed one
            if not ready:
                self._say_where_they_are()
                self._restart()
                raise RuntimeError("\n".join(errors) or f"{function} did not end within {timeout} s")
        if errors:
            self._restart()
            raise RuntimeError("\n".join(errors))
        return [answers[pipe] for pipe in self.pipes]

    def _say_where_they_are(self) -> None:
        """Every rank writes its stack to standard error, which pytest shows with the failure."""
        for process in self.processes:
            os.kill(process.pid, STUCK)
        time.sleep(1)

    def _restart(self) -> None:
        """Start afresh: after a failure the ranks no longer agree on where they are."""
        world = len(self.pipes)
        self.close(patience=0)
        self.__init__(world)  # type: ignore[misc]

    def close(self, patience: float = 10) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(patience)
            if process.is_alive():
                helpers = psutil.Process(process.pid).children(recursive=True)  # managers of checkpoint writers
                for one in (process, *helpers):
                    one.kill()
