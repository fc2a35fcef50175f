"""Time of one call."""

import time
from collections.abc import Callable

import torch


def seconds(run: Callable[[], object], device: str) -> float:
    """Return the seconds that `run` takes.

    On a CPU this is the time of the calling thread, on which other processes have little effect. On a GPU it is the
    wall-clock time until all work of the device is done.
    """
    if device == "cpu":
        start = time.thread_time()
        run()
        return time.thread_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start
