"""What a checkpoint is, from headers and indices alone: kind, family, sizes, and what would be refused and why."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megatron_rl.convert.kinds import Kind, find_kind
from megatron_rl.errors import MegatronRLError
from megatron_rl.weights.families import family_of
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.hf_model import check_folder
from megatron_rl.weights.megatron_keys import EXTRA_STATE
from megatron_rl.weights.safetensors_header import TensorInfo

_OPTIMIZER = ("optimizer.", "chained_")
BY_PARAMETER = "by parameter"
# What megatron-core's optimizers put into their keys -> the format, by megatron-core's name if the layout binds it.
_OPTIMIZER_FORMATS = {
    ".gbuf_idx_": "dp_reshardable",
    ".param_state": "dp_zero_gather_scatter",
    "optimizer.state.": BY_PARAMETER,
}


@dataclass
class Inspection:
    """What was found.

    Attributes:
        path: the folder that holds the weights.
        kind: kind of the checkpoint, in words.
        architecture: the model's architecture, if the folder says it.
        parameters: number of weights.
        nbytes: bytes of all tensors, optimizer included.
        dtypes: dtype -> number of tensors.
        files: number of files with weights.
        iteration: what Megatron's tracker file names.
        optimizer: how the state of an optimizer is stored: by parameter, as all layouts load it, or the name of
            megatron-core's format; empty without a state.
        quantization: method of quantized weights.
        unused: tensors that the trainer does not use.
        refused: why the weights cannot be converted; empty if they can.
        tensors: name -> shape and dtype, of the tensors asked for.
    """

    path: str
    kind: str
    architecture: str = ""
    parameters: int = 0
    nbytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    files: int = 0
    iteration: str | None = None
    optimizer: str = ""
    quantization: str = ""
    unused: list[str] = field(default_factory=list)
    refused: str = ""
    tensors: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return the findings as text."""
        shown = {key: value for key, value in asdict(self).items() if value not in ("", None, [], {}, False, 0)}
        shown["parameters"] = f"{self.parameters:,}"
        shown["nbytes"] = f"{self.nbytes / 1e9:.3g} GB"
        shown["dtypes"] = ", ".join(f"{count} x {name}" for name, count in sorted(self.dtypes.items()))
        tensors = shown.pop("tensors", {})
        if len(self.unused) > 3:
            shown["unused"] = f"{', '.join(self.unused[:3])} and {len(self.unused) - 3} more"
        return [f"{key:>14}: {value}" for key, value in shown.items()] + [
            f"  {name}  {what}" for name, what in tensors.items()
        ]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect_checkpoint(path: Path, pattern: str = "") -> Inspection:
    """Return what a checkpoint is. No tensor is read, but a tied output layer that is stored is compared.

    Args:
        path: the checkpoint, a run folder or Megatron's root folder.
        pattern: names of tensors to list, with `*`; empty: none.

    Raises:
        CheckpointError: the folder holds no checkpoint.
    """
    found = find_kind(path)
    report = Inspection(str(found.folder), found.kind.value, iteration=found.iteration, refused=found.mend)
    if found.kind is Kind.HUGGING_FACE:
        _inspect_hf(found.folder, report, pattern)
    elif found.kind is Kind.TORCH_DIST:
        from megatron_rl.convert.dist_reader import DistReader  # torch's checkpoints take seconds to import

        reader = DistReader(found.folder)
        names = {name: info for name, info in reader.tensors.items() if not name.startswith(_OPTIMIZER)}
        _count(report, reader.tensors, names, pattern)
        report.files, report.optimizer = reader.files, optimizer_format((*reader.tensors, *reader.objects))
        other = [key for key in reader.objects if EXTRA_STATE not in key and not key.startswith(_OPTIMIZER)]
        report.unused = sorted(other)
    return report


def optimizer_format(keys: Iterable[str]) -> str:
    """Return how a checkpoint with these keys stores the state of an optimizer, and an empty string without one."""
    states = [key for key in keys if key.startswith(_OPTIMIZER)]
    found = (name for part, name in _OPTIMIZER_FORMATS.items() if any(part in key for key in states))
    return next(found, "in an unknown format" if states else "")


def _inspect_hf(folder: Path, report: Inspection, pattern: str) -> None:
    try:
        opened = HFFolder(folder)
    except MegatronRLError as error:
        report.refused = str(error)
        return
    _count(report, opened.tensors, opened.tensors, pattern)
    report.files = len({info.file for info in opened.tensors.values()})
    named = opened.config.get("architectures")
    report.architecture = ", ".join(map(str, named)) if isinstance(named, list) else str(named)
    quantized = opened.config.get("quantization_config")
    report.quantization = str(quantized.get("quant_method")) if isinstance(quantized, Mapping) else ""
    try:
        report.architecture = report.architecture or family_of(opened.config, str(folder)).model_type
        report.unused = list(check_folder(opened).unused)
    except MegatronRLError as error:
        report.refused = str(error)


def _count(
    report: Inspection, every: Mapping[str, TensorInfo], weights: Mapping[str, TensorInfo], pattern: str
) -> None:
    report.nbytes = sum(info.nbytes for info in every.values())
    report.parameters = sum(info.nbytes // info.dtype.itemsize for info in weights.values())
    report.dtypes = dict(Counter(str(info.dtype).removeprefix("torch.") for info in every.values()))
    if pattern:
        report.tensors = {
            name: f"{list(info.shape)} {str(info.dtype).removeprefix('torch.')}"
            for name, info in every.items()
            if fnmatch(name, pattern)
        }
