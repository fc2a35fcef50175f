"""A pool of workers on this machine: every worker runs one cell at a time, as the ordinary command."""

import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rl.errors import ExitCode
from megatron_rl.files import replace_file, try_lock
from megatron_rl.launch.conductor.control_files import write_json
from megatron_rl.launch.ranks import SAME_STOP_S
from megatron_rl.study.cell_process import CellStarter
from megatron_rl.study.cell_status import over_budget, spent
from megatron_rl.study.study_folder import Record, StudyFolder
from megatron_rl.supervise import Leader, end_sessions
from megatron_rl.trainer.run_folder import LOCK_NAME

_POLL_S = 0.05
_BUDGET_S = 2.0  # between looks at what the cells have spent
_LEFT_S = 20.0  # for what a killed pool has left behind to end
_GRACE_S = 60.0  # for cells to end their engines after a second request to stop
BUDGET = "budget"  # reason of a stop in the control folder of a run


@dataclass
class _Running:
    cell: str
    slot: int
    process: Leader
    began: float
    asked: bool = False
    spent: bool = False


class CellPool:
    """Runs cells until all have ended or a stop is requested.

    Args:
        folder: the folder of the study.
        budget: its budget.
        workers: cells that run at the same time.
        attempts: how often a cell is started that ended with an error that may go away.
        gpus: GPUs that each worker has for itself; 0: every worker sees all.
    """

    def __init__(self, folder: StudyFolder, budget: Record, *, workers: int, attempts: int, gpus: int) -> None:
        self.folder, self.budget, self.workers, self.attempts, self.gpus = folder, budget, workers, attempts, gpus
        self._starter = CellStarter()
        self._running: list[_Running] = []
        self._stops: list[float] = []
        self._starts: dict[str, int] = {}
        self._ended = 0
        self._looked = 0.0

    def run(self, cells: Sequence[str]) -> bool:
        """Run these cells. Return False if a stop was requested before all had ended.

        The first request lets running cells save their last whole step; a second one ends them at once.
        """
        waiting = deque(cells)
        asking = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, lambda *_: self._stops.append(time.monotonic())) for number in asking}
        try:
            while self._running or (waiting and not self._stops):
                while waiting and len(self._running) < self.workers and not self._stops:
                    self._start(waiting.popleft())
                self._obey()
                self._end_spent()
                for one in [one for one in self._running if one.process.poll() is not None]:
                    if self._note_end(one, len(cells)):
                        waiting.append(one.cell)
                time.sleep(_POLL_S)
        finally:
            end_sessions([one.process for one in self._running], _GRACE_S)
            self._starter.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return not self._stops

    def _start(self, cell: str) -> None:
        slot = min(set(range(self.workers)) - {one.slot for one in self._running})
        self._wait_until_free(cell)
        arguments = ["train", str(self.folder.plan(cell)), "--resume=auto"]
        process = self._starter.start(arguments, self._environment(slot), self.folder.output(cell))
        self._starts[cell] = self._starts.get(cell, 0) + 1
        self._running.append(_Running(cell, slot, process, time.time()))
        self._write_running()
        print(f"{cell}: begins", flush=True)

    def _wait_until_free(self, cell: str) -> None:
        """Wait for processes of a pool that was killed: they end by themselves, a moment after it."""
        path, deadline = self.folder.run(cell) / LOCK_NAME, time.monotonic() + _LEFT_S
        while path.is_file() and time.monotonic() < deadline:
            lock = try_lock(path)
            if lock is not None:
                lock.release()
                return
            time.sleep(_POLL_S)

    def _environment(self, slot: int) -> dict[str, str]:
        cores = len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else os.cpu_count() or 1
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // self.workers)))
        environment = {"OMP_NUM_THREADS": threads}
        if self.gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            names = visible.split(",") if visible else [str(n) for n in range(self.workers * self.gpus)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[slot * self.gpus : (slot + 1) * self.gpus])
        return environment

    def _write_running(self) -> None:
        content = json.dumps([one.cell for one in self._running]).encode()
        replace_file(self.folder.folder / "running.json", content)

    def _obey(self) -> None:
        """Pass a request to stop on to the cells, once."""
        if not self._stops:
            return
        if self._stops[-1] - self._stops[0] > SAME_STOP_S:
            end_sessions([one.process for one in self._running], 0.0, signal.SIGKILL)
            return
        for one in self._running:
            if not one.asked:
                one.asked = True
                one.process.send_signal(signal.SIGINT)
                print(f"{one.cell}: is asked to stop", flush=True)

    def _end_spent(self) -> None:
        """Ask the cells that have spent their budget of tokens or seconds to stop after their present step."""
        if self.budget["tokens"] is None and self.budget["seconds"] is None:
            return
        if time.monotonic() - self._looked < _BUDGET_S:
            return
        self._looked = time.monotonic()
        for one in self._running:
            run = self.folder.run(one.cell)
            _, tokens, seconds = spent(run)
            if not one.asked and over_budget(self.budget, tokens, seconds):
                one.asked = one.spent = True
                write_json(str(run / "control" / "stop"), {"reason": BUDGET})

    def _note_end(self, one: _Running, count: int) -> bool:
        """Record the end of a cell's command. Return whether it is started again."""
        code = one.process.poll() or 0
        code = 128 - code if code < 0 else code
        self._running.remove(one)
        self._write_running()
        self.folder.add_attempt(cell=one.cell, code=code, began=one.began, ended=time.time())
        again = code == ExitCode.RETRY and self._starts[one.cell] < self.attempts and not self._stops
        self._ended += not again
        words = "done" if code == ExitCode.DONE else f"ended with code {code}, see {self.folder.output(one.cell)}"
        if code == ExitCode.INTERRUPTED and one.spent:
            words = "done, its budget is spent"
        words += "; it is started again" * again
        print(f"{one.cell}: {words} ({time.time() - one.began:.0f} s; {self._ended} of {count})", flush=True)
        return again
