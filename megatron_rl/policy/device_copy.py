"""Copies to the device: all tensors of a micro-batch travel as one block."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_ALIGNMENT = 16  # bytes; every dtype can be viewed from there


def on_device(value: T, device: torch.device) -> T:
    """Return a value whose tensors are on `device`.

    Dozens of small copies from pageable memory would each wait for a GPU. So there is one copy, of one block. For a GPU
    the block is pinned, and nothing waits for the copy.

    Args:
        value: tensors of the host, in dataclasses, dicts and tuples at any depth. Everything else stays as it is.
        device: the device.
    """
    found: dict[int, Tensor] = {}
    map_tensors(value, lambda tensor: found.setdefault(id(tensor), tensor))
    if not found:
        return value
    starts, size = {}, 0
    for key, tensor in found.items():
        starts[key] = size
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    block = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for key, tensor in found.items():
        _part(block, starts[key], tensor).copy_(tensor)
    there = block.to(device, non_blocking=True)
    moved = {key: _part(there, starts[key], tensor) for key, tensor in found.items()}
    return map_tensors(value, lambda tensor: moved[id(tensor)])


def map_tensors(value: T, function: Callable[[Tensor], Tensor]) -> T:
    """Return a value with `function` applied to each tensor in its dataclasses, dicts and tuples."""
    mapped: Any = value
    if isinstance(value, Tensor):
        mapped = function(value)
    elif isinstance(value, dict):
        mapped = {key: map_tensors(one, function) for key, one in value.items()}
    elif isinstance(value, tuple):
        mapped = tuple(map_tensors(one, function) for one in value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        mapped = dataclasses.replace(value, **{name: map_tensors(one, function) for name, one in held.items()})
    return mapped


def _part(block: Tensor, start: int, like: Tensor) -> Tensor:
    """Return the part of a block from byte `start` on that has a tensor's dtype and shape."""
    return block[start : start + like.nbytes].view(like.dtype).view(like.shape)
