"""Requests to stop a run, on rank 0: signals, the file `control/stop` and the deadline of the allocation.

A signal, or a preemption, stops at the next safe point and cancels the generation that is running. Any other request
lets the present step end if it can end in time.
"""

import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable

import numpy as np

from megatron_rl.trainer.run_control import USER, RunControl

POLL_S = 1.0
_KEPT = 100  # durations from which a quantile is taken
_AT_ONCE = "preempted"  # the reason of a stop that leaves no time for the present step
_DEADLINE = "deadline"


def percentile95(seconds: Iterable[float]) -> float:
    """Return the 95th percentile of durations, 0 without any. Of fewer than 20 it is the longest."""
    found = list(seconds)
    return float(np.percentile(found, 95, method="higher")) if found else 0.0


class Stops:
    """Watches the control folder in a thread. `close` ends it.

    Args:
        control: the control folder.
        margin_s: seconds that must be left before a deadline, `run.deadline_margin_s`.

    Attributes:
        save_s: seconds that complete checkpoints took.
    """

    def __init__(self, control: RunControl, margin_s: float) -> None:
        self.control, self.margin_s = control, margin_s
        self.save_s: Iterable[float] = ()
        self._opened = time.time()
        self._step_s: deque[float] = deque(maxlen=_KEPT)
        self._began: float | None = None  # the present step, in the time of `time.monotonic`; None: the run starts
        self._reason = ""
        self._signaled = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop-requests", daemon=True)
        self._thread.start()

    @property
    def reason(self) -> str:
        """Why the run stops. A launcher's request comes before the signal that it sends later."""
        request = self.control.stop_request()
        return self._reason or (USER if request is None else request.reason)

    def due_before_step(self) -> bool:
        """Return whether the run must stop before the step that is about to begin. Measures the step before it."""
        now = time.monotonic()
        if self._began is not None:
            self._step_s.append(now - self._began)
        self._began = now
        self._look()
        if self._late(percentile95(self._step_s)):
            self._note(_DEADLINE)
        return bool(self._reason)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(POLL_S):
            self._look()

    def _look(self) -> None:
        """Read the control folder once. If the present step must not end, send this process the signal of a stop."""
        request = self.control.stop_request()
        if request is not None:
            self._note(request.reason)
        at_once = request is not None and (request.reason == _AT_ONCE or self._began is None)
        # A step that is asked to end must have the time for it. Any other one goes on while it can still be saved.
        if self._late(self._left_of_step() if request is not None else 0.0):
            self._note(_DEADLINE)
            at_once = True
        if at_once and not self._signaled:
            self._signaled = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def _left_of_step(self) -> float:
        return 0.0 if self._began is None else max(percentile95(self._step_s) - (time.monotonic() - self._began), 0.0)

    def _late(self, work_s: float) -> bool:
        """Return whether work of so many seconds and a checkpoint after it cannot end before the deadline."""
        deadline = self.control.deadline()
        if deadline is None or deadline < self._opened:  # that of an earlier allocation
            return False
        return time.time() + work_s + percentile95(self.save_s) + self.margin_s > deadline

    def _note(self, reason: str) -> None:
        if not self._reason:
            self._reason = reason
            print(f"stopping ({reason}): the last whole step is saved", file=sys.stderr, flush=True)
