"""The training stack in a launcher that forks its ranks: imported once, and reset in every rank."""

import importlib
import os
import random

import numpy as np
import torch

STACK = "megatron_rl.trainer.bringup"  # what every rank imports


def import_stack() -> bool:
    """Import what every rank needs. Import nothing and return False with CUDA, which does not survive a fork."""
    if torch.cuda.is_available():
        return False
    importlib.import_module(STACK)
    return True


def like_new() -> None:
    """Reset a forked rank to the state of a new process: OMP_NUM_THREADS threads, and newly seeded generators."""
    threads = os.environ["OMP_NUM_THREADS"]  # torch reads it only while it is imported
    if threads.isdecimal():
        torch.set_num_threads(int(threads))
    torch.default_generator.seed()
    random.seed()
    np.random.seed()
