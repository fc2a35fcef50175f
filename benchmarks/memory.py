"""Peak memory of a call."""

from collections.abc import Callable

import torch


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak of the tensor bytes that a call allocates, above those allocated before it.

    On CUDA this is the allocator's own count. On CPU it comes from torch's profiler, which records every allocation and
    every release of a tensor.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak
