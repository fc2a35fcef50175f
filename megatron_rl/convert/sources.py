"""What is converted: the weights of a model, one parameter of its name table at a time."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.convert.kinds import Kind, find_kind
from megatron_rl.errors import CheckpointError, UserError
from megatron_rl.files import parse_json
from megatron_rl.policy.checkpoint_files import COMPLETE, check_digests, find_defect, read_list
from megatron_rl.weights.families import Family, ModelShape, read_family
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.hf_model import HFModel, check_folder
from megatron_rl.weights.megatron_keys import megatron_place
from megatron_rl.weights.name_table import Entry, entries
from megatron_rl.weights.safetensors_header import TensorInfo


class WeightSource(ABC):
    """The weights of one model.

    Attributes:
        path: the folder that they are read from.
        family: the model's family.
        shape: the model's shape.
        tensors: Hugging Face name -> shape and dtype, and the file for messages.
    """

    path: Path
    family: Family
    shape: ModelShape
    tensors: dict[str, TensorInfo]

    @abstractmethod
    def read(self, entry: Entry) -> tuple[Tensor, ...]:
        """Return the Hugging Face tensors of a parameter, in the dtypes of `tensors`. Of stacked ones, its part."""

    @abstractmethod
    def origin(self, entry: Entry) -> list[str]:
        """Return the names of the stored tensors that a parameter is read from."""

    @property
    def entries(self) -> list[Entry]:
        """The parameters that are written, in export order."""
        return [entry for entry in entries(self.family, self.shape) if entry.rule.exported]

    def nbytes(self, entry: Entry) -> int:
        """Return the bytes of a parameter's Hugging Face tensors, or of its part of them."""
        shapes = zip(entry.rule.hf, entry.rule.layout.shapes, strict=True)
        return sum(prod(shape) * self.tensors[name].dtype.itemsize for name, shape in shapes)

    def units(self) -> list[tuple[Entry, ...]]:
        """Return the parameters in groups that share Hugging Face tensors: all experts of a stacked one, or one."""
        return [tuple(group) for _, group in groupby(self.entries, key=lambda entry: entry.rule.hf)]


class HFSource(WeightSource):
    """A Hugging Face folder."""

    def __init__(self, path: Path) -> None:
        self.model: HFModel = check_folder(HFFolder(path))
        self.path, self.family, self.shape = path, self.model.family, self.model.shape
        self.tensors = self.model.tensors

    def read(self, entry: Entry) -> tuple[Tensor, ...]:
        parts = zip(entry.rule.hf, self.model.readers(entry), entry.rule.layout.shapes, strict=True)
        return tuple(reader(0, shape[0]).to(self.tensors[name].dtype) for name, reader, shape in parts)

    def origin(self, entry: Entry) -> list[str]:
        return sorted({stored for name in entry.rule.hf for stored in self.model.stored_as(name)})


class MegatronSource(WeightSource):
    """A `torch_dist` checkpoint, with the config.json of the Hugging Face model that it belongs to.

    Args:
        path: the folder with `.metadata`.
        config: config.json of the model.
        where: path of config.json, for error messages.
    """

    def __init__(self, path: Path, config: dict[str, Any], where: str) -> None:
        from megatron_rl.convert.dist_reader import DistReader  # torch's checkpoints take seconds to import

        self.path, self._where = path, where
        self.family, self.shape = read_family(config, where)
        self.reader = DistReader(path)
        self.tensors = {}
        self._places = {}
        for entry in entries(self.family, self.shape):
            place = megatron_place(entry, self.shape)
            if entry.rule.exported:
                self._check(entry, place.key, place.counts)
                self._places[entry.mcore] = place

    def _check(self, entry: Entry, key: str, counts: Sequence[int]) -> None:
        stored = self.reader.tensors.get(key)
        if stored is None:
            raise CheckpointError(
                f"{self.path} has no tensor '{key}', which {self._where} asks for: the checkpoint is of another model"
            )
        expected = (*counts, *entry.rule.layout.local_shape(1))
        rows = stored.shape[0] if entry.layer is None and len(expected) == 2 else expected[0]
        # Embedding and output layer have rows at the end that fill the vocabulary up to a multiple of the ranks.
        if stored.shape[1:] != expected[1:] or rows < expected[0] or (rows != stored.shape[0]):
            raise CheckpointError(
                f"tensor '{key}' of {self.path} has shape {list(stored.shape)}, but {self._where} asks for "
                f"{list(expected)}: the checkpoint is of another model"
            )
        for name, shape in zip(entry.rule.hf, entry.stored_shapes(self.shape), strict=True):
            self.tensors[name] = TensorInfo(shape, stored.dtype, self.path)

    def read(self, entry: Entry) -> tuple[Tensor, ...]:
        return entry.rule.layout.merge([self.parameter(entry)])

    def parameter(self, entry: Entry) -> Tensor:
        """Return a parameter as megatron-core has it on one rank."""
        place = self._places[entry.mcore]
        return self.reader.read(place.key, place.index, entry.rule.layout.local_shape(1))

    def origin(self, entry: Entry) -> list[str]:
        return [self._places[entry.mcore].key]


@dataclass(frozen=True)
class Like:
    """The Hugging Face folder whose configuration, names, dtypes and other files a conversion takes over.

    Attributes:
        path: the folder.
        config: its config.json.
        folder: its weights, if it has any.
    """

    path: Path
    config: dict[str, Any]
    folder: HFFolder | None

    @staticmethod
    def open(path: Path) -> "Like":
        """Open a folder. It needs a config.json, and may lack weights."""
        if any(path.glob("*.safetensors")):
            folder = HFFolder(path)
            return Like(path, folder.config, folder)
        file = path / "config.json"
        try:
            config = dict(parse_json(file.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}): --like needs a Hugging Face folder") from error
        return Like(path, config, None)

    def dtype(self, name: str, stored: torch.dtype) -> torch.dtype:
        """Return the dtype in which a tensor is written: the folder's, or without weights there the stored one."""
        info = None if self.folder is None else self.folder.tensors.get(name)
        plain = info is not None and info.dtype.is_floating_point and info.dtype.itemsize > 1
        return info.dtype if info is not None and plain else stored


def open_source(path: Path, like: Path | None) -> WeightSource:
    """Open the weights in a folder, whatever kind it is.

    Args:
        path: the folder.
        like: the Hugging Face folder that a Megatron checkpoint belongs to.

    Raises:
        CheckpointError, ConfigError: the weights are damaged or of a model that is not supported.
        UserError: a Megatron checkpoint is given without `like`.
    """
    found = find_kind(path)
    if found.kind is Kind.HUGGING_FACE:
        return HFSource(found.folder)
    if found.kind is not Kind.TORCH_DIST:
        raise CheckpointError(f"{path} is {found.kind.value}, which cannot be read: {found.mend}")
    if like is None:
        raise UserError(f"{path} holds Megatron's weights without the model's configuration: give --like HF_FOLDER")
    _check_files(found.folder)
    return MegatronSource(found.folder, Like.open(like).config, str(like / "config.json"))


def _check_files(folder: Path) -> None:
    """Compare the files of a training checkpoint with their digests. Checkpoints of other writers have none.

    Raises:
        CheckpointError: names the file that is damaged.
    """
    if not (folder / COMPLETE).is_file():
        return
    defect = find_defect(folder)
    if defect is None:
        listed = read_list(folder)
        if listed.digests is None:
            print(f"{folder} was written without digests: its content is not verified", file=sys.stderr)
            return
        damage = check_digests(folder, listed, listed.sizes).damage
        defect = damage[0][1] if damage else None
    if defect is not None:
        raise CheckpointError(f"{folder} is not usable: {defect}; restore it from a copy, or convert an older one")
