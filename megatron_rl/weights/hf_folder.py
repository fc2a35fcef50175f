"""A Hugging Face checkpoint folder: read by slices, written by shards.

Before any byte of data is used, the header of every safetensors file is checked against the file's size. A folder is
written under a temporary name next to its destination and gets its final name only when it is complete.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_rl.errors import CheckpointError
from megatron_rl.weights.digest import tensor_digest

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "manifest.json"
_HEADER_LIMIT = 100_000_000  # bytes; the safetensors library has the same limit
_ASSET_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}
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
_VALUES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Reader(Protocol):
    """A function that reads `tensor.narrow(dim, start, stop - start)` of one stored tensor without reading the rest."""

    def __call__(self, start: int, stop: int, dim: int = 0) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape, dtype and file of one tensor, as the header states them."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class HFFolder:
    """config.json and the safetensors headers of one folder. Tensor data is read on demand, by slices.

    Attributes:
        config: config.json as a dict.
        tensors: name -> TensorInfo.
        assets: the other files that a copy of the model needs (configuration, tokenizer, chat templates), relative to
            the folder.

    Raises:
        CheckpointError: names the file or tensor, if the folder is incomplete, truncated or contradictory.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(
                f"no model folder at {self.path}: give the folder that holds config.json and safetensors files"
            )
        if not (self.path / "config.json").is_file():
            raise CheckpointError(
                f"{self.path} has no config.json: it is not a Hugging Face model folder, or the copy is incomplete"
            )
        self.config: dict[str, Any] = _read_json(self.path / "config.json")
        self.tensors: dict[str, TensorInfo] = _read_headers(self.path)
        self.assets: list[Path] = _find_assets(self.path)
        self._handles: dict[Path, Any] = {}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: info.dtype for name, info in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """Return the whole tensor in its stored dtype."""
        try:
            tensor: Tensor = self._handle(name).get_tensor(name)
            return tensor
        except SafetensorError as error:
            raise CheckpointError(f"tensor '{name}' in {self.tensors[name].file} cannot be read: {error}") from error

    def read_rows(self, name: str, start: int, stop: int, dim: int = 0) -> Tensor:
        """Return `read(name).narrow(dim, start, stop - start)`, reading only this slice.

        Args:
            name: name of the tensor.
            start: first index of the slice.
            stop: index after the last one of the slice.
            dim: dimension that is sliced.
        """
        index = (*(slice(None) for _ in range(dim)), slice(start, stop))
        try:
            rows: Tensor = self._handle(name).get_slice(name)[index]
            return rows
        except SafetensorError as error:
            raise CheckpointError(f"tensor '{name}' in {self.tensors[name].file} cannot be read: {error}") from error

    def reader(self, name: str) -> Reader:
        """Return `read_rows` bound to one tensor."""
        return partial(self.read_rows, name)

    def close(self) -> None:
        self._handles.clear()

    def _handle(self, name: str) -> Any:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path} has no tensor '{name}'")
        if info.file not in self._handles:
            self._handles[info.file] = safe_open(str(info.file), framework="pt")
        return self._handles[info.file]


def write_hf_folder(
    dest: Path | str,
    tensors: Iterable[tuple[str, Tensor]],
    source: HFFolder,
    *,
    shard_bytes: int = 5 * 2**30,
    manifest_version: int | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Write a complete model folder: shards, index, the source's assets, and config.json with the true dtype.

    Shards are streamed: at most `shard_bytes` of tensors (or one larger tensor) are in memory at a time. `dest` appears
    only when every file is complete. An existing model folder there is replaced by two renames; anything else is
    refused.

    Args:
        dest: the folder to write.
        tensors: (name, tensor) pairs.
        source: the folder whose assets and config.json are used.
        shard_bytes: maximum bytes of tensors in one shard.
        manifest_version: if given, manifest.json is written as {"version", "tensors": {name: digest}}.
        quantization: the `quantization_config` of config.json, for tensors that are codes and scales.

    Returns:
        name -> digest.

    Raises:
        CheckpointError: if `dest` exists and is not a model folder, or if a tensor appears twice.
    """
    dest = Path(dest)
    if dest.exists() and not (dest.is_dir() and ((dest / "config.json").is_file() or not any(dest.iterdir()))):
        raise CheckpointError(f"{dest} exists and is not a model folder: choose another destination or remove it")
    dest.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{dest.name}.writing-", dir=dest.parent))
    try:
        # mkdtemp makes a private folder. Users who may read the parent may also read the model.
        temporary.chmod(dest.parent.stat().st_mode & 0o755)
        digests, dtypes = _write_shards(temporary, tensors, shard_bytes)
        _copy_assets(source, temporary)
        _write_config(source, temporary, dtypes, quantization)
        if manifest_version is not None:
            _write_json(temporary / MANIFEST, {"version": manifest_version, "tensors": digests})
        _replace(temporary, dest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return digests


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _read_headers(folder: Path) -> dict[str, TensorInfo]:
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise CheckpointError(f"{folder} holds both {SINGLE} and {INDEX}: remove the one that is out of date")
    if single.is_file():
        return _read_header(single)
    if not index.is_file():
        raise CheckpointError(
            f"{folder} holds neither {SINGLE} nor {INDEX}: save the model with safe_serialization=True"
        )
    listed = _read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise CheckpointError(f"{index} has no 'weight_map' of tensor names to file names: fetch the file again")
    found: dict[str, TensorInfo] = {}
    for file in sorted(set(listed.values())):
        if not (folder / file).is_file():
            raise CheckpointError(f"shard {folder / file} is listed in {INDEX} but missing: fetch it again")
        for name, info in _read_header(folder / file).items():
            if listed.get(name) != file:
                raise CheckpointError(
                    f"tensor '{name}' is in {info.file} but {INDEX} does not place it there: the files do not match"
                )
            found[name] = info
    absent = sorted(set(listed) - set(found))
    if absent:
        raise CheckpointError(f"tensor '{absent[0]}' is listed in {INDEX} but absent from {folder / listed[absent[0]]}")
    return found


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """Read names, shapes and dtypes of one safetensors file, and check them against the size of the file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > _HEADER_LIMIT:
            raise CheckpointError(f"{file} is not a safetensors file (its header cannot be read): fetch it again")
        if size < 8 + length:
            raise CheckpointError(f"{file} is truncated inside its header ({size} bytes): fetch it again")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        found = {name: _tensor_info(entry, file) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} has a malformed safetensors header ({error}): fetch it again") from error
    needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != needed:
        fault = "truncated" if size < needed else "longer than its header says"
        raise CheckpointError(f"{file} is {fault}: {size} bytes instead of {needed}; fetch it again")
    return found


def _tensor_info(entry: dict[str, Any], file: Path) -> TensorInfo:
    info = TensorInfo(tuple(entry["shape"]), _DTYPES[entry["dtype"]], file)
    start, stop = entry["data_offsets"]
    if stop - start != info.nbytes:
        raise ValueError(f"{entry['dtype']} {list(info.shape)} does not fill bytes {start} to {stop}")
    return info


def _find_assets(folder: Path) -> list[Path]:
    def carried(path: Path) -> bool:
        weights = path.name.endswith(".index.json") or path.name == MANIFEST
        return (
            path.is_file()
            and not weights
            and (path.suffix in _ASSET_SUFFIXES or path.name.startswith(("LICENSE", "NOTICE")))
        )

    top = [path for path in folder.iterdir() if carried(path)]
    templates = folder.glob("additional_chat_templates/*.jinja")
    return sorted(path.relative_to(folder) for path in (*top, *templates))


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int
) -> tuple[dict[str, str], dict[str, tuple[torch.dtype, int]]]:
    """Write the shards and, if there is more than one, their index.

    Return name -> digest and name -> (dtype, bytes).
    """
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    sizes: dict[str, tuple[torch.dtype, int]] = {}

    def flush() -> None:
        save_file(shard, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    held = 0
    for name, tensor in tensors:
        if name in digests:
            raise CheckpointError(f"tensor '{name}' is written twice: an export must give every name once")
        if shard and held + tensor.nbytes > shard_bytes:
            flush()
            held = 0
        shard[name] = tensor.detach().cpu().contiguous()
        held += tensor.nbytes
        digests[name] = tensor_digest(shard[name])
        sizes[name] = (tensor.dtype, tensor.nbytes)
    if not shard:
        raise CheckpointError(f"nothing to write to {folder}: the export gave no tensors")
    flush()
    _name_shards(folder, shards, sum(nbytes for _, nbytes in sizes.values()))
    return digests, sizes


def _name_shards(folder: Path, shards: list[list[str]], total_size: int) -> None:
    if len(shards) == 1:
        (folder / "0.part").rename(folder / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    _write_json(
        folder / INDEX, {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    )


def _copy_assets(source: HFFolder, folder: Path) -> None:
    for asset in source.assets:
        (folder / asset).parent.mkdir(exist_ok=True)
        shutil.copyfile(source.path / asset, folder / asset)


def _write_config(
    source: HFFolder,
    folder: Path,
    written: Mapping[str, tuple[torch.dtype, int]],
    quantization: Mapping[str, Any] | None,
) -> None:
    """Write the dtype that holds most of the bytes into config.json, if writing changed any tensor's dtype.

    In a quantized folder this is the dtype of the unquantized tensors, because it is the dtype to compute in.
    """
    if quantization is not None:
        written = {name: entry for name, entry in written.items() if name in source.tensors and entry[0] in _VALUES}
    changed = any(
        name in source.tensors and source.tensors[name].dtype != dtype for name, (dtype, _) in written.items()
    )
    added = {} if quantization is None else {"quantization_config": dict(quantization)}
    if not changed and not added:
        return
    weight: dict[torch.dtype, int] = {}
    for dtype, nbytes in written.values():
        weight[dtype] = weight.get(dtype, 0) + nbytes
    # transformers 4 wrote torch_dtype, 5 writes dtype. Both may be present, and then both must be correct.
    keys = [key for key in ("dtype", "torch_dtype") if key in source.config] or ["dtype"]
    name = str(max(weight, key=lambda dtype: weight[dtype])).removeprefix("torch.")
    _write_json(folder / "config.json", source.config | dict.fromkeys(keys, name) | added)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _replace(temporary: Path, dest: Path) -> None:
    """Rename the complete folder to its final name.

    The folder that it replaces stays next to it until the rename has succeeded.
    """
    for file in temporary.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    if not dest.exists():
        temporary.rename(dest)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{dest.name}.replaced-", dir=dest.parent))
    try:
        dest.rename(aside / dest.name)
        try:
            temporary.rename(dest)
        except OSError:
            (aside / dest.name).rename(dest)
            raise
    finally:
        shutil.rmtree(aside)
