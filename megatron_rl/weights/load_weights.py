"""Loading of a Hugging Face folder into the parameters of this rank. Only what this rank holds is read."""

from collections.abc import Sequence

import torch
from torch import nn

from megatron_rl.errors import CheckpointError, PrecisionError
from megatron_rl.precision.finite import is_finite
from megatron_rl.weights.hf_model import HFModel
from megatron_rl.weights.name_table import entries, local_tensors


def load_weights(chunks: Sequence[nn.Module], model: HFModel, *, tp_rank: int, tp_size: int) -> None:
    """Fill every parameter of every chunk from a checked folder, cast to the parameter's dtype.

    No parameter keeps its initial value. Every error is raised before the first parameter changes. Call this function
    before the optimizer copies the parameters.

    Args:
        chunks: the model chunks of this rank, one per virtual pipeline stage.
        model: the weights, from `check_folder`.
        tp_rank: tensor-parallel rank.
        tp_size: number of tensor-parallel ranks.

    Raises:
        CheckpointError: if a parameter has no rule, a rule has no parameter, or a local shape does not fit.
    """
    held = local_tensors(chunks, entries(model.family, model.shape))
    for name, (entry, parameter) in held.items():
        expected = entry.rule.layout.local_shape(entry.cut(tp_size))
        if tuple(parameter.shape) != expected:
            raise CheckpointError(
                f"parameter '{name}' of the model has shape {list(parameter.shape)} on tensor-parallel rank {tp_rank} "
                f"of {tp_size}, but the checkpoint gives {list(expected)}: "
                "build the model from the folder's config.json"
            )
    with torch.no_grad():
        for entry, parameter in held.values():
            sources = model.readers(entry)
            size = entry.cut(tp_size)
            parameter.copy_(entry.rule.layout.read(sources, tp_rank % size, size))


def find_bad_weights(models: Sequence[nn.Module], source: HFModel) -> CheckpointError | PrecisionError | None:
    """Return the error for loaded weights of this rank that are not finite, or that float16 cannot hold, or None."""
    for entry, tensor in local_tensors(models, entries(source.family, source.shape)).values():
        if is_finite(tensor):
            continue
        where = f"tensor {' or '.join(entry.rule.hf)} of {source.path}"
        if tensor.dtype == torch.float16 and not torch.isnan(tensor).any():
            return PrecisionError(f"{where} has values that float16 cannot hold: set precision.train to bf16 or fp32")
        return CheckpointError(f"{where} has values that are NaN or infinite: the weights are damaged, fetch them")
    return None
