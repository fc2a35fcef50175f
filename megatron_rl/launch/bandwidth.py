"""Bandwidth between nodes, for preflight: one rank on each sends to every other, and the slow node is named.

`launch preflight --bandwidth MIB` starts `python -m megatron_rl.launch.bandwidth MIB LEAST` on every node with srun,
after the facts. On GPUs it uses NCCL, else gloo.
"""

import os
import sys
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

from megatron_rl.launch.slurm_env import join_slurm_step

_TIMES = 3
Rates = Mapping[tuple[str, str], float]


def pair_rounds(ranks: int) -> list[list[tuple[int, int]]]:
    """Return rounds of pairs: every two ranks meet once, and a rank is in one pair of a round at most."""
    places: list[int | None] = [*range(ranks), *([None] if ranks % 2 else [])]
    rounds = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        places = [places[0], places[-1], *places[1:-1]]
    return rounds


def slow_nodes(rates: Rates, least: float) -> list[str]:
    """Return the nodes to which no other sends with at least `least` GB/s."""
    best: dict[str, float] = {}
    for pair, rate in rates.items():
        for node in pair:
            best[node] = max(rate, best.get(node, 0.0))
    return sorted(node for node, rate in best.items() if rate < least)


def report_lines(rates: Rates, least: float) -> list[str]:
    """Return what was measured as lines: the middle, the slowest pair, and the slow nodes."""
    (first, second), rate = min(rates.items(), key=lambda pair: pair[1])
    lines = [f"bandwidth: {len(rates)} pairs, median {median(rates.values()):.3g} GB/s"]
    lines.append(f"bandwidth: the slowest pair is {first} and {second}, {rate:.3g} GB/s")
    for node in slow_nodes(rates, least):
        best = max(rate for pair, rate in rates.items() if node in pair)
        lines.append(f"bandwidth: refused {node}: at most {best:.3g} GB/s with any other, {least:g} are required")
    return lines


def measure_pairs(rank: int, host: str, ranks: int, size: int) -> dict[tuple[str, str], float]:
    """Return GB/s of every pair of nodes on rank 0, {} elsewhere. Collective.

    Args:
        rank: this rank.
        host: its node.
        ranks: number of ranks, one on each node.
        size: bytes that a node sends to another at once.
    """
    import torch  # seconds of import, which the launcher does without
    import torch.distributed as dist

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    control = dist.new_group(backend="gloo")
    data = torch.zeros(size, dtype=torch.uint8, device=device)

    def exchange(begins: bool, peer: int) -> float:
        start = time.perf_counter()
        for sends in (begins, not begins):
            dist.send(data, peer) if sends else dist.recv(data, peer)
        data[:1].tolist()  # waits for the device
        return time.perf_counter() - start

    found: dict[tuple[int, int], float] = {}
    for pairs in pair_rounds(ranks):
        for first, second in pairs:
            if rank in (first, second):
                took = [exchange(rank == first, second if rank == first else first) for _ in range(_TIMES + 1)]
                found[first, second] = 2 * size / median(took[1:]) / 1e9  # the first one connects
        dist.barrier(group=control)
    boxes: list[Any] = [None] * ranks
    dist.all_gather_object(boxes, (host, found), group=control)
    dist.destroy_process_group()
    hosts = [name for name, _ in boxes]
    merged = {pair: rate for _, own in boxes for pair, rate in own.items()}
    return {(hosts[a], hosts[b]): rate for (a, b), rate in sorted(merged.items())} if rank == 0 else {}


def run_rank() -> None:
    """Take part in the measurement as one rank. Rank 0 prints the report and exits with 1 if a node is too slow."""
    join_slurm_step()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    size, least = int(sys.argv[1]) << 20, float(sys.argv[2])
    rates = measure_pairs(rank, os.environ["SLURMD_NODENAME"], ranks, size)
    if rank == 0:
        print("\n".join(report_lines(rates, least)), flush=True)
        sys.exit(1 if slow_nodes(rates, least) else 0)


if __name__ == "__main__":
    run_rank()
