"""Block-FP8 weights in the written folder: which tensors become codes with scales, and their values."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_rl.config import PrecisionConfig
from megatron_rl.convert.sources import HFSource, WeightSource
from megatron_rl.errors import UserError
from megatron_rl.precision.formats import find_format, quantize
from megatron_rl.precision.plan import WIRE, resolve
from megatron_rl.weights.quantized import quantization_config, scale_name
from megatron_rl.weights.safetensors_header import TensorInfo

FORMATS = tuple(name for name in WIRE if name.startswith("fp8"))


class Coder:
    """Quantizes the matrices that engines quantize. Codes that the source already has in this format stay as they are.

    Args:
        name: `fp8_blockwise` or `fp8_blockwise_pow2`.
        source: the weights.

    Raises:
        UserError: the format is not known.
    """

    def __init__(self, name: str, source: WeightSource) -> None:
        if name not in FORMATS:
            raise UserError(f"--quantize is '{name}'; valid: none, {', '.join(FORMATS)}")
        precision = PrecisionConfig(train="bf16", rollout=name)
        self._plan = resolve(precision, source.shape.num_layers, engine="embedded", device="cpu")
        self._format, self._source = find_format(self._plan.wire), source

    def coded(self, name: str) -> bool:
        """Return whether a tensor is written as codes and scales."""
        return self._plan.quantized(name) and len(self._source.tensors[name].shape) == 2

    def infos(self, name: str) -> dict[str, TensorInfo]:
        """Return the tensors that are written for a coded one."""
        info = self._source.tensors[name]
        rows, columns = info.shape
        high, wide = self._format.tile(rows, columns)
        tiles = -(-rows // high), -(-columns // wide)
        codes = TensorInfo(info.shape, torch.float8_e4m3fn, info.file)
        return {name: codes, scale_name(name, self._format): TensorInfo(tiles, torch.float32, info.file)}

    def encode(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield codes and scales of a tensor, by the names that `infos` gives."""
        scales = scale_name(name, self._format)
        stored = self._stored(name)
        if stored is not None:
            yield from zip((name, scales), stored, strict=True)
            return
        coded = quantize(tensor, self._plan.wire)
        yield name, coded.codes
        yield scales, coded.scale_inv

    def _stored(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return the codes and scales of the source, if it has them in this format."""
        if not isinstance(self._source, HFSource):
            return None
        held, folder = self._source.model.stored_as(name), self._source.model.folder
        wanted = self.infos(name)[scale_name(name, self._format)]
        if len(held) != 2 or folder.tensors[held[1]].shape != wanted.shape:
            return None
        scales = folder.read(held[1]).to(torch.float32)
        if self._format.pow2 and not bool((torch.frexp(scales).mantissa == 0.5).all()):
            return None
        return folder.read(held[0]), scales

    def config(self, names: Iterable[str]) -> Mapping[str, Any]:
        """Return the `quantization_config` of a folder with these tensors."""
        found = quantization_config(self._plan, names)
        assert found is not None
        return found
