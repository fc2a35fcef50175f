"""Peak memory of a call, as the benchmarks report it."""

from collections.abc import Callable

import torch


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes of tensors alive at once that a call allocates, over what there was before it.

    CUDA: the allocator's own count. CPU: torch's profiler, which sees every allocation and every release of a tensor.
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
