"""The header of a safetensors file: names, shapes, dtypes and places of its tensors."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_rl.errors import CheckpointError

_LFS_POINTER = b"version https://git-lfs.github.com/spec"
_HEADER_LIMIT = 100_000_000  # bytes; the safetensors library has the same limit
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Other dtypes of the format: those of codes and scales of four to eight bits, and those that no model's weights have.
_NOT_READ = {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "U16", "U32", "U64", "C64"}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape, dtype and file of one tensor, as the header states them."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read names, shapes and dtypes of one safetensors file, and check that its tensors fill the file exactly.

    Raises:
        CheckpointError: if the file is cut, is no safetensors file, has holes, overlaps or a name twice, or a dtype
            that is not read.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if _LFS_POINTER.startswith(start) and start:
            raise CheckpointError(f"{file} is a Git-LFS pointer, not the weights: run `git lfs pull` in the folder")
        if size < 8 or length > _HEADER_LIMIT:
            raise CheckpointError(f"{file} is not a safetensors file (its header cannot be read): fetch it again")
        if size < 8 + length:
            raise CheckpointError(f"{file} is truncated inside its header ({size} bytes): fetch it again")
        raw = stream.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        foreign = next((name for name, entry in header.items() if entry["dtype"] in _NOT_READ), None)
        if foreign is not None:
            raise CheckpointError(
                f"tensor '{foreign}' in {file} is {header[foreign]['dtype']}, which is not read: give the float32, "
                "bfloat16 or float16 weights"
            )
        found = {name: _tensor_info(entry, file) for name, entry in header.items()}
        end = _check_filled({name: entry["data_offsets"] for name, entry in header.items()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} has a malformed safetensors header ({error}): fetch it again") from error
    needed = 8 + length + end
    if size != needed:
        fault = "truncated" if size < needed else "longer than its header says"
        raise CheckpointError(f"{file} is {fault}: {size} bytes instead of {needed}; fetch it again")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' stands twice")
    return found


def _tensor_info(entry: dict[str, Any], file: Path) -> TensorInfo:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"dtype {entry['dtype']!r} is not known")
    info = TensorInfo(tuple(entry["shape"]), _DTYPES[entry["dtype"]], file)
    start, stop = entry["data_offsets"]
    if stop - start != info.nbytes:
        raise ValueError(f"{entry['dtype']} {list(info.shape)} does not fill bytes {start} to {stop}")
    return info


def _check_filled(places: dict[str, list[int]]) -> int:
    """Return the end of the last tensor's bytes. Raise ValueError if tensors overlap or leave a hole."""
    end = 0
    for name, (start, stop) in sorted(places.items(), key=lambda item: item[1]):
        if start != end:
            raise ValueError(f"bytes of '{name}' begin at {start} instead of {end}")
        end = stop
    return end
