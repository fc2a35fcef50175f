"""The parts of a Hugging Face folder: safetensors shards, written header first and then tensor after tensor."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.convert.codes import Coder
from megatron_rl.convert.parts import Part, PartReport
from megatron_rl.convert.sources import WeightSource
from megatron_rl.errors import CheckpointError
from megatron_rl.files import create_large_file
from megatron_rl.precision.finite import is_finite
from megatron_rl.weights.hf_folder import INDEX, SINGLE
from megatron_rl.weights.hf_model import HFModel
from megatron_rl.weights.name_table import Entry
from megatron_rl.weights.safetensors_header import DTYPE_NAMES, TensorInfo

ALIGNMENT = 8  # bytes; data begins at a multiple of it, as the library writes it


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor, without a copy if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class ShardFile:
    """One shard: whole tensors, in order.

    Attributes:
        file: name of the file.
        entries: the parameters.
    """

    file: str
    entries: tuple[Entry, ...]

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(dict.fromkeys(name for entry in self.entries for name in entry.rule.hf))


def plan_shards(
    units: Sequence[tuple[Entry, ...]], sizes: Callable[[Entry], int], limit: int, more: int
) -> list[ShardFile]:
    """Distribute parameters over shards of at most `limit` bytes, or of one unit that is larger.

    Args:
        units: the parameters, in order; those of one unit stay together.
        sizes: returns the bytes of a parameter.
        limit: largest size of a shard, in bytes.
        more: number of further shards that the index lists.
    """
    groups = grouped(units, sizes, limit)
    if len(groups) + more == 1:
        return [ShardFile(SINGLE, tuple(groups[0]))]
    return [ShardFile(shard_name(number, len(groups) + more), tuple(group)) for number, group in enumerate(groups)]


def shard_name(number: int, count: int) -> str:
    """Return the name of a shard (from 0)."""
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def grouped(units: Iterable[tuple[Entry, ...]], sizes: Callable[[Entry], int], limit: int) -> list[list[Entry]]:
    """Distribute units of parameters over groups of at most `limit` bytes, or of one unit that is larger.

    Args:
        units: the parameters, in order; those of one unit stay together.
        sizes: returns the bytes of a parameter.
        limit: largest size of a group, in bytes.
    """
    groups: list[list[Entry]] = []
    held = 0
    for unit in units:
        size = sum(sizes(entry) for entry in unit)
        if not groups or held + size > limit:
            groups.append([])
            held = 0
        groups[-1].extend(unit)
        held += size
    return groups


def shard_part(
    shard: ShardFile, source: WeightSource, dtypes: Mapping[str, torch.dtype], coder: Coder | None = None
) -> Part:
    """Return the part that writes a shard.

    Args:
        shard: the shard.
        source: the weights.
        dtypes: dtype of each written tensor that is not coded.
        coder: writes matrices as codes and scales; None: all tensors are plain.
    """
    written: dict[str, TensorInfo] = {}
    for name in shard.names:
        plain = TensorInfo(source.tensors[name].shape, dtypes[name], source.path)
        written |= {name: plain} if coder is None or not coder.coded(name) else coder.infos(name)

    def tensors() -> Iterator[Piece]:
        for entry in shard.entries:
            for name, tensor in zip(entry.rule.hf, source.read(entry), strict=True):
                if not is_finite(tensor):
                    raise CheckpointError(f"tensor '{name}' of {source.path} has values that are NaN or infinite")
                coded = coder is not None and coder.coded(name)
                for part, values in coder.encode(name, tensor) if coder is not None and coded else ((name, tensor),):
                    yield part, values, source.origin(entry)

    return _part(shard.file, written, tensors)


def carried_part(file: str, model: HFModel) -> Part:
    """Return the part that copies the tensors of a folder that are not trained.

    Args:
        file: name of the shard.
        model: the folder.
    """
    return _part(file, model.carried_tensors, lambda: ((name, tensor, [name]) for name, tensor in model.carried()))


Piece = tuple[str, Tensor, list[str]]
"""Name of a tensor, the tensor or the next part of it, and the stored names it was read from."""


def _part(file: str, written: Mapping[str, TensorInfo], pieces: Callable[[], Iterator[Piece]]) -> Part:
    def write(path: Path, add: Callable[[int], None]) -> PartReport:
        records: dict[str, PartReport] = {}
        hashes: dict[str, Any] = {}
        with create_large_file(path) as opened:
            opened.write(header_bytes(written))
            for name, tensor, origin in pieces():
                info = written[name]
                content = as_bytes(tensor.to(info.dtype))
                opened.write(content)
                add(len(content))
                hashes.setdefault(name, hashlib.sha256()).update(content)
                records[name] = {
                    "shape": list(info.shape),
                    "dtype": str(info.dtype).removeprefix("torch."),
                    "sha256": hashes[name].hexdigest(),
                    "from": origin,
                }
                if info.dtype != tensor.dtype:
                    records[name]["cast_from"] = str(tensor.dtype).removeprefix("torch.")
        return {"tensors": records}

    return Part(file, sum(info.nbytes for info in written.values()), tuple(written), write)


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


def index_text(places: Mapping[str, str], nbytes: int) -> tuple[str, str]:
    """Return name and text of the index file.

    Args:
        places: tensor name -> file.
        nbytes: bytes of all tensors.
    """
    content = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(places.items()))}
    return INDEX, json.dumps(content, indent=2) + "\n"
