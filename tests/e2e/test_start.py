"""The launcher forks the ranks of a run if it can. The results equal those of ranks that start as new processes."""

import os
import sys

import psutil
import pytest
import torch

from tests.e2e.command import Command, records
from tests.e2e.test_resume import untimed

FORKED = ["mrl-rank0", "mrl-rank1"]


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or torch.cuda.is_available() or (os.cpu_count() or 1) < 2,
    reason="ranks are forked on Linux without CUDA, and numpy has threads on two cores",
)
def test_forked_ranks_compute_what_new_processes_compute(start, small_run, tmp_path):
    fixed = ["parallel.tensor=2", "rollout.deterministic=true", "run.steps=2"]
    forked = start("train", small_run, *fixed, "run.name=forked", OMP_NUM_THREADS="1")  # a new process
    assert forked.until(lambda: names_of_ranks(forked)) == FORKED
    assert forked.wait().code == 0
    new = start("train", small_run, *fixed, "run.name=new", OPENBLAS_NUM_THREADS="2")  # threads forbid a fork
    assert set(new.until(lambda: names_of_ranks(new))).isdisjoint(FORKED)
    assert new.wait().code == 0
    runs = tmp_path / "runs"
    ours, theirs = ([untimed(record) for record in records(runs / name)] for name in ("forked", "new"))
    assert ours == theirs and len(ours) == 2
    weights = "hf/model.safetensors"
    assert (runs / "forked" / weights).read_bytes() == (runs / "new" / weights).read_bytes()


def names_of_ranks(command: Command) -> list[str]:
    """Return the names of the two trainer processes, in the order of their start; [] before both have them."""
    children = psutil.Process(command.process.pid).children()
    ranks = [p.name() for p in children if p.name() in FORKED or "RANK" in p.environ()]
    return ranks if len(ranks) == 2 else []
