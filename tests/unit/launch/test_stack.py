"""A launcher imports no compiler before it forks, starts no thread, and shares nothing between ranks."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rl.forking import like_new

ROOT = Path(__file__).resolve().parents[3]
# What each command imports in a rank, or instead of one.
STACKS = ("trainer.bringup", "sft", "trainer.attribution", "attribution.hidden", "trainer.evaluate")
IMPORT = """
import importlib, os, sys
from megatron_rl.launch.ranks import one_thread
with one_thread():
    import torch, transformers
    for name in sys.argv[1:]:
        if os.fork() == 0:
            importlib.import_module("megatron_rl." + name)
            tasks = len(os.listdir("/proc/self/task"))
            print(name, "torch._dynamo" in sys.modules, "torch._inductor" in sys.modules, tasks)
            sys.stdout.flush()
            os._exit(0)
        os.wait()
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA megatron-core is imported as it is")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ranks are forked on Linux only")
def test_the_training_stack_imports_no_compiler_and_starts_no_thread():
    """The compiler takes 3 s to import. A launcher with threads cannot fork its ranks."""
    command = [sys.executable, "-c", IMPORT, *STACKS]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == [f"{name} False False 1" for name in STACKS], found.stderr
    assert "UserWarning" not in found.stderr


def test_a_forked_rank_has_the_threads_and_random_numbers_of_a_new_process(monkeypatch):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        drawn = []
        for _ in range(2):
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            torch.set_num_threads(2)
            monkeypatch.setenv("OMP_NUM_THREADS", "1")
            like_new()
            assert torch.get_num_threads() == 1
            drawn.append((float(torch.rand(())), random.random(), float(np.random.random())))
        assert all(a != b for a, b in zip(*drawn, strict=True))
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
