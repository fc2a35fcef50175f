"""The training stack in a launcher that forks its ranks: imported once, and like new in every rank."""

import importlib
import os
import random

import numpy as np
import torch

STACK = "megatron_rl.trainer.bringup"  # what every rank imports


def import_stack() -> bool:
    """Import what every rank needs. Return False, with nothing imported, if there is CUDA, which survives no fork."""
    if torch.cuda.is_available():
        return False
    importlib.import_module(STACK)
    return True


def like_new() -> None:
    """Give a forked rank what a new process has: threads as OMP_NUM_THREADS says, and its own random generators."""
    threads = os.environ["OMP_NUM_THREADS"]  # torch reads it only while it is imported
    if threads.isdecimal():
        torch.set_num_threads(int(threads))
    torch.default_generator.seed()
    random.seed()
    np.random.seed()
