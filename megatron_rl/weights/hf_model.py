"""A model folder whose family and shape are known. Its tensors have the names of the family's table.

Whatever form a folder stores them in: experts that are stacked, codes with scales, a tied output layer without its
embedding.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.errors import CheckpointError, ConfigError
from megatron_rl.weights.families import Family, ModelShape, read_family
from megatron_rl.weights.hf_folder import HFFolder, Reader
from megatron_rl.weights.layouts import check_divides
from megatron_rl.weights.name_table import Entry, entries
from megatron_rl.weights.safetensors_header import TensorInfo
from megatron_rl.weights.stored_forms import BlockFP8, PlainTensor, StackedPart, StoredForm

_COMPARE_BYTES = 64 * 2**20
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GIVE_PLAIN = "give the float32, bfloat16 or float16 weights"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_SCALES = "_scale_inv"


class HFModel:
    """The weights of one model, from a checked folder.

    Attributes:
        folder: the folder as it is stored.
        family: the model's family.
        shape: the model's shape.
        tensors: name in the family's table -> shape, dtype and file. Codes count as bfloat16: their values are written
            as such.
        buffers: those of them that are neither trained nor cast.
        unused: stored tensors that the trainer does not use, such as the layers of multi-token prediction.
    """

    def __init__(
        self,
        folder: HFFolder,
        family: Family,
        shape: ModelShape,
        plan: Iterable[Entry],
        forms: Mapping[str, StoredForm],
        tile: tuple[int, int] | None,
    ) -> None:
        self.folder, self.family, self.shape, self._forms = folder, family, shape, forms
        self.tensors: dict[str, TensorInfo] = {name: form.info for name, form in forms.items()}
        self.buffers = frozenset(name for entry in plan if entry.rule.buffer for name in entry.rule.hf)
        used = {stored for form in forms.values() for stored in form.stored}
        self.unused: tuple[str, ...] = tuple(name for name in folder.tensors if name not in used)
        prefixes = family.carried(shape)
        names = [name for name in self.unused if name.startswith(prefixes) and not name.endswith(_SCALES)]
        self._carried = {name: _form_of(folder, name, tile) for name in names}

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def config(self) -> dict[str, Any]:
        return self.folder.config

    @property
    def assets(self) -> list[Path]:
        return self.folder.assets

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: info.dtype for name, info in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data, in the dtypes of `tensors`."""
        return sum(info.nbytes for info in self.tensors.values())

    def read_rows(self, name: str, start: int, stop: int, dim: int = 0) -> Tensor:
        """Return `tensor.narrow(dim, start, stop - start)`, reading only this slice.

        Args:
            name: name in the family's table.
            start: first index of the slice.
            stop: index after the last one of the slice.
            dim: dimension that is sliced.
        """
        return self._forms[name].read(start, stop, dim)

    def read(self, name: str) -> Tensor:
        """Return a whole tensor, in the dtype of `tensors`."""
        info = self.tensors[name]
        return self._forms[name].read(0, info.shape[0]).to(info.dtype)

    def readers(self, entry: Entry) -> list[Reader]:
        """Return the readers of an entry's Hugging Face tensors. Of a stacked one they read the expert's part."""
        if entry.rule.stacked and entry.expert is not None:
            return [partial(self._read_expert, name, entry.expert) for name in entry.rule.hf]
        return [partial(self.read_rows, name) for name in entry.rule.hf]

    def _read_expert(self, name: str, expert: int, start: int, stop: int, dim: int = 0) -> Tensor:
        return self.folder.read_at(name, (expert, *(slice(None) for _ in range(dim)), slice(start, stop)))

    @property
    def carried_tensors(self) -> dict[str, TensorInfo]:
        """Shape and dtype of the tensors that `carried` yields."""
        return {name: form.info for name, form in self._carried.items()}

    def carried(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the stored tensors that are not trained and belong into a copy of the model.

        They are unchanged, except that FP8 codes are dequantized to bfloat16, as those of trained tensors are.
        """
        for name, form in self._carried.items():
            plain = isinstance(form, PlainTensor)
            yield name, self.folder.read(name) if plain else form.read(0, form.info.shape[0]).to(form.info.dtype)

    def stored_as(self, name: str) -> tuple[str, ...]:
        """Return the names of the stored tensors that a tensor of the table is read from."""
        return self._forms[name].stored


def check_folder(folder: HFFolder, *, tensor_parallel: int = 1, expert_parallel: int = 1) -> HFModel:
    """Check a folder against its family's name table, from the headers alone, before any model is built.

    Only one check reads tensor data: an `lm_head.weight` that is stored although the embeddings are tied must have the
    values of the embedding.

    Args:
        folder: the folder to check.
        tensor_parallel: number of tensor-parallel ranks.
        expert_parallel: number of expert-parallel ranks.

    Raises:
        ConfigError: if the model is not supported, or if the tensor- or expert-parallel size does not divide it.
        CheckpointError: if a tensor is missing, is unknown or has a wrong shape.
    """
    where = str(folder.path / "config.json")
    family, shape = read_family(folder.config, where)
    tile = _check_quantization(folder)
    plan = entries(family, shape)
    cut = [entry for entry in plan if entry.expert is None]
    check_divides({key: count for entry in cut for key, count in entry.rule.layout.units.items()}, tensor_parallel)
    _check_experts(shape, expert_parallel, where)
    for entry in cut:
        entry.rule.layout.check(tensor_parallel)
    forms: dict[str, StoredForm] = {}
    for entry in plan:
        if entry.rule.stacked and entry.expert:
            continue  # the first expert's entry has the same tensors
        for index, (name, expected) in enumerate(zip(entry.rule.hf, entry.stored_shapes(shape), strict=True)):
            forms[name] = _find_form(folder, entry, index, tile, shape.tied_embeddings)
            _check_tensor(folder, name, forms[name], expected)
    model = HFModel(folder, family, shape, plan, forms, tile)
    for name in model.unused:
        if not name.startswith(family.carried(shape)):
            _check_unused(folder, name, family, shape)
    return model


def _find_form(folder: HFFolder, entry: Entry, index: int, tile: tuple[int, int] | None, tied: bool) -> StoredForm:
    """Return the form in which a folder stores one tensor of an entry. Raise CheckpointError if it has none."""
    name = entry.rule.hf[index]
    if name in folder.tensors:
        return _form_of(folder, name, tile)
    if tied and name == _EMBEDDING and _HEAD in folder.tensors:
        return PlainTensor(folder, _HEAD)
    other = None if entry.rule.other is None else entry.rule.other[index]
    if other in folder.tensors and entry.rule.other is not None:
        if entry.expert is None:
            return PlainTensor(folder, other)
        rows = entry.rule.layout.shapes[index][0]
        return StackedPart(folder, other, entry.expert, rows * entry.rule.other[:index].count(other), rows)
    expected = list(entry.rule.layout.shapes[index])
    mend = "; if the output layer is the embedding, set tie_word_embeddings: true" if name == _HEAD else ""
    raise CheckpointError(
        f"{folder.path} has no tensor '{name}', which its config.json asks for (shape {expected}){mend}"
    )


def _form_of(folder: HFFolder, name: str, tile: tuple[int, int] | None) -> StoredForm:
    scales = f"{name}{_SCALES}"
    return BlockFP8(folder, name, scales, tile) if tile and scales in folder.tensors else PlainTensor(folder, name)


def _check_tensor(folder: HFFolder, name: str, form: StoredForm, expected: tuple[int, ...]) -> None:
    info = form.info
    if info.shape != expected:
        raise CheckpointError(
            f"tensor '{name}' in {info.file} has shape {list(info.shape)}, but config.json asks for {list(expected)}"
        )
    if isinstance(form, BlockFP8):
        _check_codes(folder, form)
        return
    for stored in form.stored:
        dtype = folder.tensors[stored].dtype
        if dtype not in _WEIGHT_DTYPES:
            word = str(dtype).removeprefix("torch.")
            raise CheckpointError(
                f"tensor '{stored}' in {info.file} is {word}: only float32, bfloat16 and float16 weights are trained; "
                + ("convert it to float32" if dtype == torch.float64 else f"if it is quantized, {_GIVE_PLAIN}")
            )


def _check_codes(folder: HFFolder, form: BlockFP8) -> None:
    codes, scales = folder.tensors[form.name], folder.tensors[form.scales]
    if codes.dtype != torch.float8_e4m3fn or len(codes.shape) != 2:
        raise CheckpointError(
            f"tensor '{form.name}' in {codes.file} has scales, but is {codes.dtype} {list(codes.shape)} and no "
            "matrix of FP8 codes"
        )
    tiles = tuple(-(-size // tile) for size, tile in zip(codes.shape, form.tile, strict=True))
    if scales.shape not in (tiles, ()):
        raise CheckpointError(
            f"tensor '{form.scales}' in {scales.file} has shape {list(scales.shape)}, but {list(codes.shape)} codes in "
            f"tiles of {list(form.tile)} need {list(tiles)}"
        )


def _check_quantization(folder: HFFolder) -> tuple[int, int] | None:
    """Return the tile of block-FP8 weights, or None for plain ones.

    Raises:
        CheckpointError: if the folder is quantized in another way, or config.json contradicts the tensors.
    """
    record, where = folder.config.get("quantization_config"), folder.path / "config.json"
    codes = next((name for name, info in folder.tensors.items() if info.dtype.itemsize < 2), None)
    if record is None:
        return None
    if not isinstance(record, Mapping):
        raise CheckpointError(f"{where}: 'quantization_config' is {record!r}, a mapping is needed")
    method, tile = record.get("quant_method"), record.get("weight_block_size")
    if codes is None and not any("packed" in name or "qweight" in name for name in folder.tensors):
        raise CheckpointError(
            f"{where} has a 'quantization_config' ({method!r}), but every tensor is plain: engines would take the "
            "weights for codes. Remove this key from config.json"
        )
    if method != "fp8" or record.get("fmt", "e4m3") != "e4m3":
        raise CheckpointError(f"{folder.path} is quantized with {method!r}, which is not read: {_GIVE_PLAIN}")
    if tile is None:
        tile = [1, 1]  # one scale for a whole tensor
    if not (isinstance(tile, list) and len(tile) == 2 and all(isinstance(n, int) and n > 0 for n in tile)):
        raise CheckpointError(f"{where}: 'weight_block_size' is {tile!r}, two positive integers are needed")
    return tile[0], tile[1]


def _check_unused(folder: HFFolder, name: str, family: Family, shape: ModelShape) -> None:
    """Check that a stored tensor that the trainer does not use may be left out. Raise CheckpointError if not."""
    if name.endswith(family.ignored):
        return
    if name == _HEAD and shape.tied_embeddings:
        _check_tied(folder)
        return
    if name.endswith(_SCALES):
        raise CheckpointError(
            f"tensor '{name}' in {folder.tensors[name].file} is a scale, but config.json says nothing of block-FP8 "
            "codes: set its quantization_config as the model's authors have it"
        )
    raise CheckpointError(
        f"tensor '{name}' in {folder.tensors[name].file} is not in the table of {family.architectures[0]} with "
        f"{shape.num_layers} layers: the weights and {folder.path / 'config.json'} do not belong together, or the "
        "model is not supported"
    )


def _check_tied(folder: HFFolder) -> None:
    a, b = folder.tensors[_HEAD], folder.tensors[_EMBEDDING]
    same = a.shape == b.shape
    wider = torch.promote_types(a.dtype, b.dtype)
    rows = max(1, _COMPARE_BYTES // max(1, b.nbytes // b.shape[0]))
    for start in range(0, b.shape[0] if same else 0, rows):
        stop = min(start + rows, b.shape[0])
        of_head, of_embedding = (folder.read_rows(name, start, stop).to(wider) for name in (_HEAD, _EMBEDDING))
        if not torch.equal(of_head, of_embedding):
            same = False
            break
    if not same:
        raise CheckpointError(
            f"tensor '{_HEAD}' in {a.file} differs from '{_EMBEDDING}' although config.json ties them: "
            "set tie_word_embeddings to false, or remove the tensor"
        )


def _check_experts(shape: ModelShape, expert_parallel: int, where: str) -> None:
    if shape.experts is None and expert_parallel > 1:
        raise ConfigError(
            f"parallel.expert = {expert_parallel} spreads experts, and {where} is a dense model: set it to 1"
        )
    if shape.experts is not None and shape.experts.count % expert_parallel:
        raise ConfigError(
            f"parallel.expert = {expert_parallel} does not divide the {shape.experts.count} experts of {where}"
        )
