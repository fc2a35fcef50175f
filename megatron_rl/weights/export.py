"""Export of the model's parameters from any parallel layout.

Global rank 0 receives the Hugging Face tensors, one at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_rl.errors import CheckpointError
from megatron_rl.weights.families import Family, ModelShape
from megatron_rl.weights.name_table import Entry, entries, local_tensors

Holdings = tuple[int, dict[str, tuple[int, ...]]]
"""What a rank contributes: its tensor-parallel rank, and the local shape of each parameter it is to send."""


def export_weights(
    chunks: Sequence[nn.Module],
    family: Family,
    shape: ModelShape,
    *,
    dtypes: Mapping[str, torch.dtype],
    control: dist.ProcessGroup | None = None,
) -> Iterator[tuple[str, Tensor | None]]:
    """Return an iterator over the model's Hugging Face tensors. This is collective over all ranks.

    Every rank must run the iterator to its end. The iterator yields (Hugging Face name, tensor) in the same order on
    every rank. The tensor has dtype `dtypes[name]` on global rank 0 and is None on all other ranks. Tied embeddings
    appear once. A tensor may share memory with a parameter: use it before the next update.

    Only one replica takes part: data- and context-parallel rank 0, and for experts expert-data-parallel rank 0. Peak
    extra memory: one whole mcore parameter on the rank that merges it, and one Hugging Face tensor on rank 0. If this
    tensor is stacked, it holds all experts of a layer.

    Args:
        chunks: the model chunks of this rank, one per virtual pipeline stage.
        family: the model's family.
        shape: the model's shape.
        dtypes: dtype of every exported tensor, by Hugging Face name; the same on every rank.
        control: group over all ranks, used for one exchange of names. Default: the world.

    Raises:
        CheckpointError: on every rank, if the ranks together do not hold the model of the name table, or if
            `dtypes` lacks a tensor.
    """
    plan = [entry for entry in entries(family, shape) if entry.rule.exported]
    untyped = [name for entry in plan for name in entry.rule.hf if name not in dtypes]
    if untyped:
        raise CheckpointError(f"no dtype is given for tensor '{untyped[0]}' of the export")
    parameters = {name: parameter for name, (_, parameter) in local_tensors(chunks, entries(family, shape)).items()}
    experts = {entry.mcore for entry in plan if entry.expert is not None}
    owners = _owners(
        plan, _exchange(parameters, experts, control), parallel_state.get_tensor_model_parallel_world_size()
    )
    return _stream(plan, parameters, owners, dtypes, 0 if shape.experts is None else shape.experts.count)


def _exchange(
    parameters: Mapping[str, Tensor], experts: AbstractSet[str], control: dist.ProcessGroup | None
) -> list[Holdings]:
    """Return what every rank sends, in rank order.

    Only the first replica sends its parameters. Experts have their own replicas (expert data parallel).
    """
    first = parallel_state.get_data_parallel_rank() == 0 and parallel_state.get_context_parallel_rank() == 0
    first_of_experts = parallel_state.get_expert_data_parallel_rank() == 0
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in parameters.items()
        if (first_of_experts if name in experts else first)
    }
    holdings: list[Holdings] = [(0, {})] * dist.get_world_size()
    dist.all_gather_object(holdings, (parallel_state.get_tensor_model_parallel_rank(), shapes), group=control)
    return holdings


def _owners(plan: Sequence[Entry], holdings: Sequence[Holdings], tp_size: int) -> dict[str, list[int]]:
    """Return mcore name -> the global ranks that hold its shards, in tensor-parallel order.

    The result is the same on every rank.
    """
    holders: dict[str, list[tuple[int, int, tuple[int, ...]]]] = {}
    for rank, held in enumerate(holdings):
        for name, local in held[1].items():
            holders.setdefault(name, []).append((held[0], rank, local))
    owners = {}
    for entry in plan:
        found = sorted(holders.get(entry.mcore, []))
        size = entry.cut(tp_size)
        if len(found) != size or (entry.expert is None and [tp_rank for tp_rank, _, _ in found] != list(range(size))):
            ranks = [rank for _, rank, _ in found]
            holder = "one rank" if entry.expert is not None else f"one tensor-parallel group of {size}"
            raise CheckpointError(f"parameter '{entry.mcore}' is held by ranks {ranks}, not by {holder}")
        expected = entry.rule.layout.local_shape(size)
        for _, rank, local in found:
            if local != expected:
                raise CheckpointError(
                    f"parameter '{entry.mcore}' has shape {list(local)} on rank {rank}, not {list(expected)}"
                )
        owners[entry.mcore] = [rank for _, rank, _ in found]
    return owners


def _stream(
    plan: Sequence[Entry],
    parameters: Mapping[str, Tensor],
    owners: Mapping[str, list[int]],
    dtypes: Mapping[str, torch.dtype],
    experts: int,
) -> Iterator[tuple[str, Tensor | None]]:
    rank = dist.get_rank()
    device = next(iter(parameters.values())).device
    whole: Tensor | None = None  # a tensor of several experts, on rank 0
    if any(group[0] != 0 for group in owners.values()):
        # NCCL makes the communicator of all ranks at their first collective call. Transfers need it.
        dist.all_reduce(torch.zeros(1, device=device))
    for entry in plan:
        group = owners[entry.mcore]
        merged: tuple[Tensor, ...] | None = None
        if rank in group:
            merged = _merge(entry, parameters[entry.mcore].detach(), group)
        for index, (name, full) in enumerate(zip(entry.rule.hf, entry.rule.layout.shapes, strict=True)):
            dtype = dtypes[name]
            tensor = None
            if merged is not None:
                tensor = merged[index].to(dtype)
                if rank != 0:
                    _transfer(dist.isend, tensor, 0)
            elif rank == 0:
                tensor = torch.empty(full, dtype=dtype, device=device)
                _transfer(dist.irecv, tensor, group[0])
            if not entry.rule.stacked:
                yield name, tensor if rank == 0 else None
                continue
            assert entry.expert is not None
            if rank == 0 and tensor is not None:
                whole = tensor.new_empty(experts, *full) if whole is None else whole
                whole[entry.expert] = tensor
            if entry.expert == experts - 1:  # entries of one tensor follow each other, in the order of the experts
                yield name, whole
                whole = None


def _merge(entry: Entry, shard: Tensor, group: Sequence[int]) -> tuple[Tensor, ...] | None:
    """Return the Hugging Face tensors on the first rank of `group`, and None on its other ranks."""
    first = dist.get_rank() == group[0]
    if len(group) == 1 or entry.rule.layout.replicated:
        return entry.rule.layout.merge([shard]) if first else None
    shard = shard.contiguous()
    shards = [torch.empty_like(shard) for _ in group] if first else None
    buffers = None if shards is None else [_bytes(buffer) for buffer in shards]
    dist.gather(_bytes(shard), buffers, dst=group[0], group=parallel_state.get_tensor_model_parallel_group())
    return None if shards is None else entry.rule.layout.merge(shards)


def _transfer(send_or_receive: Callable[..., Any], tensor: Tensor, peer: int) -> None:
    """Send a tensor to another rank, or receive it from there.

    In a batch, also of one, NCCL uses the communicator of all ranks. Outside one it makes one for each pair of ranks.
    """
    for work in dist.batch_isend_irecv([dist.P2POp(send_or_receive, _bytes(tensor), peer)]):
        work.wait()


def _bytes(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor as bytes, so that communication is the same for every dtype and backend."""
    return tensor.view(-1).view(torch.uint8)
