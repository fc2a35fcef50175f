"""A Hugging Face checkpoint folder, read by slices.

Before any byte of data is used, the header of every safetensors file is checked against the file's size.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_rl.errors import CheckpointError
from megatron_rl.files import parse_json
from megatron_rl.weights.safetensors_header import TensorInfo, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "manifest.json"
_ASSET_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}


class Reader(Protocol):
    """A function that reads `tensor.narrow(dim, start, stop - start)` of one stored tensor without reading the rest."""

    def __call__(self, start: int, stop: int, dim: int = 0) -> Tensor: ...


class ModelFiles(Protocol):
    """What a copy of a model is made from besides its weights: a folder, its configuration and its other files."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def assets(self) -> list[Path]: ...

    @property
    def tensors(self) -> dict[str, TensorInfo]: ...

    @property
    def nbytes(self) -> int: ...


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
            raise CheckpointError(f"{self.path} has no config.json: {_without_config(self.path)}")
        self.config: dict[str, Any] = _read_config(self.path / "config.json")
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
        return self.read_at(name, (*(slice(None) for _ in range(dim)), slice(start, stop)))

    def read_at(self, name: str, index: tuple[int | slice, ...]) -> Tensor:
        """Return `read(name)[index]`, reading only this part."""
        try:
            part: Tensor = self._handle(name).get_slice(name)[index]
            return part
        except SafetensorError as error:
            raise CheckpointError(f"tensor '{name}' in {self.tensors[name].file} cannot be read: {error}") from error

    def close(self) -> None:
        self._handles.clear()

    def _handle(self, name: str) -> Any:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path} has no tensor '{name}'")
        if info.file not in self._handles:
            self._handles[info.file] = safe_open(str(info.file), framework="pt")
        return self._handles[info.file]


def _without_config(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "it holds an adapter (LoRA): merge the adapter into its base model, and give the merged folder"
    return "it is not a Hugging Face model folder, or the copy is incomplete"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_json(path)
    bad = next(_not_finite(config), None)
    if bad is not None:
        raise CheckpointError(f"{path}: '{bad}' is not a finite number: fetch the file again, or correct the value")
    return config


def _not_finite(value: Any, key: str = "") -> Iterator[str]:
    """Yield the key of each NaN and infinity in a JSON value. Python's json reads them, but JSON has none."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _not_finite(part, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _not_finite(part, f"{key}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield key


def _read_headers(folder: Path) -> dict[str, TensorInfo]:
    single, index = folder / SINGLE, folder / INDEX
    listed = _read_index(index) if index.is_file() else None
    if single.is_file():
        if listed is not None and set(listed.values()) != {SINGLE}:
            raise CheckpointError(f"{folder} holds both {SINGLE} and {INDEX}: remove the one that is out of date")
        listed = listed or dict.fromkeys(read_header(single), SINGLE)
    if listed is None:
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}: {_without_weights(folder)}")
    found: dict[str, TensorInfo] = {}
    for file in sorted(set(listed.values())):
        if not (folder / file).is_file():
            raise CheckpointError(f"shard {folder / file} is listed in {INDEX} but missing: fetch it again")
        for name, info in read_header(folder / file).items():
            if listed.get(name) != file:
                raise CheckpointError(
                    f"tensor '{name}' is in {info.file} but {INDEX} does not place it there: the files do not match"
                )
            found[name] = info
    absent = sorted(set(listed) - set(found))
    if absent:
        raise CheckpointError(f"tensor '{absent[0]}' is listed in {INDEX} but absent from {folder / listed[absent[0]]}")
    return found


def _read_index(index: Path) -> dict[str, str]:
    """Return tensor name -> file name. Every file must be in the folder of the index itself."""
    listed = _read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise CheckpointError(f"{index} has no 'weight_map' of tensor names to file names: fetch the file again")
    for file in set(listed.values()):  # a large model has 163 files and 90,000 tensors
        if file in ("", ".", "..") or Path(file).name != file or "\\" in file or "\0" in file:
            name = next(name for name, place in listed.items() if place == file)
            raise CheckpointError(
                f"{index} places tensor '{name}' in {file!r}: only files of the same folder are read, so the index "
                "must hold bare file names"
            )
    return listed


def _without_weights(folder: Path) -> str:
    """Return what the folder holds instead of weights that can be read, and what to do about it."""
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        return f"it has {shards[0].name}, but no index places the tensors; fetch {INDEX} from where the folder is from"
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickled:
        return (
            f"it has {pickled[0]}, which is a pickle and may run code when it is loaded; load it with transformers "
            "where you trust it, and save it with save_pretrained, which writes safetensors"
        )
    return "the weights were not copied; fetch them"


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
