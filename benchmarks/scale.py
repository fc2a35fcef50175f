"""Print the time of a step on 8 to 1,024 GPUs, computed from coefficients, and measure those that need no GPU.

The formulas are in scale_model.py. The coefficients and their sources are in scale.json. Half of the GPUs train and
half generate. A step has one prompt for every two GPUs. `?` marks a cell with a coefficient that was read or assumed.
`~` marks a cell with a measured coefficient, at a size for which it was not measured.

`--check` measures on this machine, with stub engines in other processes and with gloo ranks:

- ingest: CPU time of rank 0 for each token, with 8, 64 and 128 engines whose responses have a real size
- control: CPU time and wall time of a control call to as many engines, all at the same time
- batch: bytes per second that leave rank 0, when it scatters a batch to 2 and 4 replicas

    python benchmarks/scale.py [--replay] [--bucket-mb 256] [--check]
"""

import argparse
import gc
import importlib
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection

from scale_model import (
    Coefficient,
    Sizes,
    Work,
    background_save,
    disk_sync,
    first_excess,
    mark,
    read_coefficients,
    step_seconds,
    terms,
)

from megatron_rl.ports import free_port

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
SHARE = 0.1  # of a step, above which a term is named
_BATCH_S, _END_S = 600, 10  # time limits of the broadcasts, and of the end of their processes


def print_table(c: dict[str, Coefficient], work: Work) -> None:
    """Print seconds of every term, one column a number of GPUs, and the step both ways."""
    rows: dict[str, list[str]] = {}
    for gpus in GPUS:
        step = replace(work, prompts=gpus // 2)
        at = Sizes.of(gpus, step)
        parts = terms(c, step, at)
        for name, part in parts.items():
            rows.setdefault(name, []).append(f"{part.seconds:.1f}{mark(c, part, at)}")
        rows.setdefault("step", []).append(f"{step_seconds(parts, overlaps=False):.0f}?")
        rows.setdefault("step, overlapped", []).append(f"{step_seconds(parts, overlaps=True):.0f}?")
        rows.setdefault("send by disk", []).append(f"{disk_sync(c, step, at).seconds:.1f}?")
    print(f"| seconds | {' | '.join(f'{gpus:,} GPUs' for gpus in GPUS)} |")
    print("|---|" + "---|" * len(GPUS))
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")
    beside = background_save(c, replace(work, prompts=1)).seconds
    print(f"\na checkpoint is written for {beside:.1f}? s beside the steps")
    order = [f"{name} from {gpus} GPUs" for gpus, name in first_excess(c, SHARE, GPUS, work)]
    print(f"more than {SHARE:.0%} of an overlapped step: {', '.join(order)}")


# Checks on a CPU. Heavy imports are inside: the table needs none of them.


def check_ingest(engines: int, groups: int = 32) -> dict[str, float]:
    """Return CPU microseconds of this process per token, with stub engines that send responses of real size."""
    from ingest import SAMPLES, canned_answer, our_batch, stubs

    from megatron_rl.engines.pool import EnginePool

    with stubs(engines, canned_answer(1024)) as urls, EnginePool(urls, timeout_s=300) as pool:
        our_batch(pool, 8, 1024)  # warm
        start, wall = time.process_time(), time.perf_counter()
        our_batch(pool, groups, 1024)
        tokens = groups * SAMPLES * 1024
        return {
            "us": (time.process_time() - start) / tokens * 1e6,
            "wall_us": (time.perf_counter() - wall) / tokens * 1e6,
        }


def check_control(engines: int, rounds: int = 5) -> dict[str, float]:
    """Return milliseconds of CPU and of time per control call, when all engines are called at the same time."""
    from ingest import stubs

    from megatron_rl.engines.pool import EnginePool
    from megatron_rl.weight_sync.transports.transport import each

    with stubs(engines, b"{}") as urls, EnginePool(urls, timeout_s=60) as pool:
        each(urls, pool.resume)  # warm
        start, wall = time.process_time(), time.perf_counter()
        for _ in range(rounds):
            failed = each(urls, pool.resume)[1]
            assert not failed, failed
        calls = rounds * engines
        return {
            "ms": (time.process_time() - start) / calls * 1e3,
            "wall_ms": (time.perf_counter() - wall) / calls * 1e3,
        }


def _rank(rank: int, world: int, port: int, size: int, pipe: Connection) -> None:
    """Take part when rank 0 scatters a batch. Rank 0 sends the seconds of each round."""
    import numpy as np
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    took = []
    for _ in range(6):
        box: list[object] = [None]
        shares = [np.zeros(size // world, np.uint8) for _ in range(world)] if rank == 0 else None
        dist.barrier()
        start = time.perf_counter()
        dist.scatter_object_list(box, shares, src=0)
        dist.barrier()
        took.append(time.perf_counter() - start)
    if rank == 0:
        pipe.send(took[1:])
    dist.destroy_process_group()


def check_batch(ranks: int, size: int = 32_000_000) -> dict[str, float]:
    """Return GB/s that leave rank 0 when it scatters a batch of `size` bytes in Python objects, one a replica."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    port = free_port()
    processes = [context.Process(target=_rank, args=(rank, ranks, port, size, theirs)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        if not ours.poll(_BATCH_S):
            raise SystemExit(f"{ranks} ranks have not finished after {_BATCH_S} s")
        took = ours.recv()
    finally:
        for process in processes:
            process.join(_END_S)
            process.kill()  # of one that has not ended by itself
    return {"gb_per_s": size / ranks * (ranks - 1) / statistics.median(took) / 1e9}


def check_terms(engines: Sequence[int], ranks: Sequence[int]) -> dict[str, dict[str, float]]:
    """Print and return what was measured for each size."""
    for module in ("ingest", "megatron_rl.weight_sync.transports.transport"):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # as a run does: collections would walk everything that was imported
    checks: list[tuple[str, Callable[[int], dict[str, float]], int]] = []
    checks += [(f"ingest/{count} engines", check_ingest, count) for count in engines]
    checks += [(f"control/{count} engines", check_control, count) for count in engines]
    checks += [(f"batch/{count} ranks", check_batch, count) for count in ranks]
    found = {}
    for name, check, count in checks:
        found[name] = check(count)
        print(f"{name:22} {'  '.join(f'{key} {value:.3g}' for key, value in found[name].items())}", flush=True)
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    print(json.dumps({"checked": found, "cores": os.cpu_count(), "load": load}))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replay", action="store_true", help="routed experts come with the tokens")
    parser.add_argument("--bucket-mb", type=int, default=256)
    parser.add_argument("--check", action="store_true", help="measure what a CPU can measure")
    args = parser.parse_args()
    work = Work(prompts=0, replays=args.replay, bucket_bytes=args.bucket_mb * 2**20)
    print_table(read_coefficients(), work)
    if args.check:
        check_terms((8, 64, 128), (2, 4))


if __name__ == "__main__":
    main()
