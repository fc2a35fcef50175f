"""The training stack in a launcher that forks its ranks: imported once."""

import importlib

import torch

STACK = "megatron_rl.trainer.bringup"  # what every rank imports


def import_stack() -> bool:
    """Import what every rank needs. Import nothing and return False with CUDA, which does not survive a fork."""
    if torch.cuda.is_available():
        return False
    importlib.import_module(STACK)
    return True
