"""The parts of a Hugging Face folder: safetensors shards, written header first and then tensor after tensor."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.convert.parts import Part, Record
from megatron_rl.convert.sources import WeightSource
from megatron_rl.errors import CheckpointError
from megatron_rl.weights.hf_folder import INDEX, SINGLE
from megatron_rl.weights.name_table import Entry
from megatron_rl.weights.quantized import is_finite
from megatron_rl.weights.safetensors_header import DTYPE_NAMES, TensorInfo

ALIGNMENT = 8  # bytes; data begins at a multiple of it, as the library writes it


def sha256_of(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes, as they are in a safetensors file."""
    return hashlib.sha256(as_bytes(tensor)).hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor, without a copy if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class Shard:
    """One shard: whole parameters, in order.

    Attributes:
        file: name of the file.
        entries: the parameters.
    """

    file: str
    entries: tuple[Entry, ...]


def plan_shards(entries: Sequence[Entry], sizes: Callable[[Entry], int], limit: int) -> list[Shard]:
    """Distribute parameters over shards of at most `limit` bytes, or of one parameter that is larger.

    Args:
        entries: the parameters, in order.
        sizes: returns the bytes of a parameter.
        limit: largest size of a shard, in bytes.
    """
    groups: list[list[Entry]] = []
    held = 0
    for entry in entries:
        size = sizes(entry)
        if not groups or held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(entry)
        held += size
    if len(groups) == 1:
        return [Shard(SINGLE, tuple(groups[0]))]
    return [
        Shard(f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups)
    ]


def shard_part(shard: Shard, source: WeightSource, dtypes: Mapping[str, torch.dtype]) -> Part:
    """Return the part that writes a shard.

    Args:
        shard: the shard.
        source: the weights.
        dtypes: dtype of each written tensor.
    """
    written = {
        name: TensorInfo(source.tensors[name].shape, dtypes[name], source.path)
        for entry in shard.entries
        for name in entry.rule.hf
    }

    def write(path: Path, add: Callable[[int], None]) -> Record:
        tensors: dict[str, Record] = {}
        with path.open("wb") as file:
            file.write(header_bytes(written))
            for entry in shard.entries:
                for name, tensor in zip(entry.rule.hf, source.read(entry), strict=True):
                    if not is_finite(tensor):
                        raise CheckpointError(f"tensor '{name}' of {source.path} has values that are NaN or infinite")
                    cast = tensor.to(dtypes[name])
                    content = as_bytes(cast)
                    file.write(content)
                    add(len(content))
                    tensors[name] = {
                        "shape": list(tensor.shape),
                        "dtype": str(cast.dtype).removeprefix("torch."),
                        "sha256": hashlib.sha256(content).hexdigest(),
                        "from": source.origin(entry),
                    }
                    if cast.dtype != tensor.dtype:
                        tensors[name]["cast_from"] = str(tensor.dtype).removeprefix("torch.")
        return {"tensors": tensors}

    return Part(shard.file, sum(info.nbytes for info in written.values()), write)


def header_bytes(tensors: Mapping[str, TensorInfo]) -> bytes:
    """Return the beginning of a safetensors file whose data follow in this order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, info in tensors.items():
        header[name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [at, at + info.nbytes],
        }
        at += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def index_text(shards: Sequence[Shard], sizes: Mapping[str, int]) -> tuple[str, str] | None:
    """Return name and text of the index file, or None for a single file.

    Args:
        shards: the shards.
        sizes: bytes of each tensor.
    """
    if len(shards) == 1:
        return None
    places = {name: shard.file for shard in shards for entry in shard.entries for name in entry.rule.hf}
    content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places.items()))}
    return INDEX, json.dumps(content, indent=2) + "\n"
