"""What the digests and the syncs of a checkpoint cost: saves with and without them, alternating in one process.

One rank saves tensors of SIZE MB with the real writer (`policy/checkpoint_writer.py`), two files, and waits for them.
Without digests, the hash of the writer is replaced by one that does nothing. Without syncs, `os.fsync` does nothing.
The files are then compared with their digests, as `--resume` does. They are in the page cache. Prints medians, and
ratios that are medians of rounds.

    python benchmarks/checkpoints.py [--size 400] [--rounds 5] [--folder DIR]
"""

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from megatron_rl.config import make_config
from megatron_rl.policy import checkpoint_writer
from megatron_rl.policy.checkpoint_files import check_digests, read_list
from megatron_rl.policy.parallel import Mesh, joined_mesh

WAYS = {"neither": (False, False), "digests": (True, False), "syncs": (False, True), "both": (True, True)}
TENSORS = 16


class NoDigest:
    """A hash that does nothing."""

    def update(self, content: Any) -> None:
        pass

    def hexdigest(self) -> str:
        return "0" * 32


@contextmanager
def only(*, digests: bool, syncs: bool) -> Iterator[None]:
    """Leave out the digests of the writer processes, the syncs, or both."""
    hashes, sync = checkpoint_writer.xxhash, os.fsync
    if not digests:
        checkpoint_writer.xxhash = types.SimpleNamespace(xxh3_128=NoDigest)
    if not syncs:
        os.fsync = lambda file: None
    try:
        yield
    finally:
        checkpoint_writer.xxhash, os.fsync = hashes, sync


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def save(content: dict[str, Any], folder: Path, mesh: Mesh) -> tuple[float, float]:
    """Save once into an empty folder. Return the seconds until everything is complete, and the CPU seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.sync()  # what earlier rounds left in the page cache must not count
    began, cpu = time.perf_counter(), cpu_seconds()
    queue = AsyncCallsQueue(persistent=False)
    checkpoint_writer.start_save(content, folder, mesh, queue, lambda: None)
    queue.maybe_finalize_async_calls(blocking=True)
    return time.perf_counter() - began, cpu_seconds() - cpu


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the median of the ratios of rounds, without the first, which warms up."""
    return statistics.median(a / b for a, b in zip(ours[1:], theirs[1:], strict=True))


def main() -> None:
    """Time all ways in every round, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=400, help="MB of a checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    options = parser.parse_args()
    config = make_config({"model": {"path": "unused"}, "task": {"name": "arithmetic"}})
    with joined_mesh(config) as mesh, tempfile.TemporaryDirectory(dir=options.folder) as place:
        shape = (options.size * 10**6 // 4 // TENSORS,)
        content = {str(n): ShardedTensor.from_rank_offsets(f"t{n}", torch.randn(shape)) for n in range(TENSORS)}
        folder, taken = Path(place) / "step", {way: [] for way in WAYS}
        checks = []
        order = list(WAYS)
        for _ in range(options.rounds + 1):  # the first one warms up
            random.shuffle(order)  # what one save leaves to the disk slows the next one
            for way in order:
                with only(digests=WAYS[way][0], syncs=WAYS[way][1]):
                    taken[way].append(save(content, folder, mesh))
            save(content, folder, mesh)
            listed = read_list(folder)
            cpu = cpu_seconds()
            check = check_digests(folder, listed, listed.sizes)
            assert not check.damage
            checks.append((check.nbytes / check.seconds / 1e9, check.nbytes / (cpu_seconds() - cpu) / 1e9))
    size = check.nbytes / 1e9
    print(f"{size:.2f} GB: wall time, GB/s, ratio | CPU time, ratio")
    walls, cpus = ({way: [pair[i] for pair in pairs] for way, pairs in taken.items()} for i in (0, 1))
    for way in WAYS:
        wall, cpu = statistics.median(walls[way][1:]), statistics.median(cpus[way][1:])
        print(
            f"{way:8} {wall:6.2f} s {size / wall:6.2f} {median_ratio(walls[way], walls['neither']):6.2f} | "
            f"{cpu:6.2f} s {median_ratio(cpus[way], cpus['neither']):6.2f}"
        )
    wall, cpu = (statistics.median(column[1:]) for column in zip(*checks, strict=True))
    print(f"compared with the digests: {wall:.2f} GB/s, {cpu:.2f} GB per CPU second")


if __name__ == "__main__":
    main()
