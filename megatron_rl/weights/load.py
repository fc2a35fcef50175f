"""Hugging Face folder -> the parameters of this rank, reading only what this rank holds."""

from collections.abc import Sequence

import torch
from torch import nn

from megatron_rl.errors import CheckpointError
from megatron_rl.weights.families import Family, ModelShape
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.name_table import entries, local_parameters


def load_weights(
    chunks: Sequence[nn.Module], folder: HFFolder, family: Family, shape: ModelShape, *, tp_rank: int, tp_size: int
) -> None:
    """Fill every parameter of every chunk from `folder`, casting to the parameter's dtype.

    `folder`, `family` and `shape` come from `check_folder`. Nothing keeps its initial value: a parameter without a
    rule, a rule without its parameter and a local shape that does not fit are CheckpointErrors, found before the
    first parameter changes. Call it before the optimizer copies the parameters.
    """
    held = local_parameters(chunks, entries(family, shape))
    for name, (entry, parameter) in held.items():
        expected = entry.rule.layout.local_shape(entry.cut(tp_size))
        if tuple(parameter.shape) != expected:
            raise CheckpointError(
                f"parameter '{name}' of the model has shape {list(parameter.shape)} on tensor-parallel rank {tp_rank} "
                f"of {tp_size}, but the checkpoint gives {list(expected)}: build the model from the folder's config.json"
            )
    with torch.no_grad():
        for entry, parameter in held.values():
            sources = [folder.reader(name) for name in entry.rule.hf]
            size = entry.cut(tp_size)
            parameter.copy_(entry.rule.layout.read(sources, tp_rank % size, size))
