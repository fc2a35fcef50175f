"""Loading of weights from a folder: either every tensor is correct, or nothing changes."""

import copy
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from megatron_rl.errors import CheckpointError
from megatron_rl.files import parse_json
from megatron_rl.precision.finite import is_finite
from megatron_rl.precision.plan import DTYPES, PrecisionPlan
from megatron_rl.server.quantized_linear import use_quantized_products
from megatron_rl.weights.digest import tensor_digest
from megatron_rl.weights.hf_folder import MANIFEST
from megatron_rl.weights.quantized import (
    check_config,
    dequantize_tensors,
    is_scale,
    model_shapes,
    quantize_at_load,
)

READABLE = (torch.float32, torch.bfloat16, torch.float16)

_BUILDING = threading.Lock()  # from_pretrained patches transformers while it runs; two at once leave it patched

transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Weights:
    """A model ready to serve, and the shapes and digests of its tensors as they were received."""

    model: PreTrainedModel
    shapes: dict[str, tuple[int, ...]]
    digests: dict[str, str]


def read_weights(
    folder: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    expected: dict[str, tuple[int, ...]] | None = None,
    version: str | None = None,
    plan: PrecisionPlan | None = None,
    like: PreTrainedModel | None = None,
) -> Weights:
    """Read every safetensors file of a folder into a new model. The caller's model is not touched.

    Args:
        folder: the folder to read.
        config: configuration of the model.
        dtype: dtype of the served parameters.
        device: device of the model.
        expected: names and shapes that the tensors must have. None at the first load, when the architecture decides.
        version: compared with the version of manifest.json, if the folder has one.
        plan: plan of an engine with quantized weights. Such an engine takes codes and scales, or quantizes what is not
            yet quantized.
        like: as in `build_weights`.

    Raises:
        CheckpointError: names the file or the tensor.
    """
    unread = ignored_names(config)
    tensors = {name: tensor for name, tensor in _read(folder).items() if unread is None or not unread.match(name)}
    stated = _stated_quantization(folder)
    _check_quantized(folder, tensors, stated, plan)
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    if expected is not None:
        _check_names(folder, model_shapes(tensors, coded=stated is not None), expected, tied_names(config))
    _check_manifest(folder, digests, version)
    # Copy even if the dtype stays the same: tensors read from a file map this file, and it may be rewritten.
    return build_weights(
        tensors,
        digests,
        config,
        dtype,
        device,
        plan=plan,
        coded=stated is not None,
        where=folder,
        copies=True,
        like=like,
    )


def build_weights(
    tensors: dict[str, torch.Tensor],
    digests: dict[str, str],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    plan: PrecisionPlan | None,
    coded: bool,
    where: Path | str,
    expected: dict[str, tuple[int, ...]] | None = None,
    copies: bool = False,
    like: PreTrainedModel | None = None,
) -> Weights:
    """Build a new model from these tensors.

    Args:
        tensors: name -> tensor. The model takes them over unless `copies`.
        digests: name -> digest of the tensors.
        config: configuration of the model.
        dtype: dtype of the served parameters.
        device: device of the model.
        plan: plan of an engine with quantized weights, otherwise None.
        coded: some tensors are codes and scales of the plan.
        where: folder or other source of the tensors, for error messages.
        expected: names and shapes that the tensors must have. None: not checked.
        copies: copy the tensors instead of taking them over.
        like: a model of the same architecture on the same device. Everything but its parameters may be shared.

    Raises:
        CheckpointError: names the tensor.
    """
    tied = tied_names(config)
    held = model_shapes(tensors, coded=coded)
    if expected is not None:
        _check_names(where, held, expected, tied)
    values = tensors if plan is None else _quantized_values(where, tensors, plan, dtype, coded=coded)
    _check_values(where, values, dtype)
    _check_tied(where, values, tied)
    exact = _kept_in_fp32(config)
    served = {
        name: tensor.to(device=device, dtype=torch.float32 if exact(name) else dtype, copy=copies)
        for name, tensor in values.items()
    }
    emulated = plan is not None and plan.quantizes_inputs
    # transformers keeps the experts of a layer in one parameter that has none of their names. Such a model cannot copy
    # `like`: it is built from its tensors each time.
    names = set() if like is None else {name for name, _ in like.named_parameters()}
    named = names <= served.keys() | tied.keys() and served.keys() <= names | tied.keys()
    if like is not None and named and not emulated:
        return Weights(_with_parameters(like, served, tied), held, digests)
    model = _build(where, config, served, dtype).to(device)
    if plan is not None and emulated:
        use_quantized_products(model, values, plan)
    return Weights(model, held, digests)


def _read(folder: Path) -> dict[str, torch.Tensor]:
    try:
        if not folder.is_dir():
            raise CheckpointError(f"no folder of weights at {folder}")
        files = sorted(folder.glob("*.safetensors"))
        special = [file for file in files if not file.is_file()]
    except OSError as error:  # a name that is too long, or a folder that may not be read
        raise CheckpointError(f"the folder of weights cannot be read ({error})") from error
    if not files:
        raise CheckpointError(f"no *.safetensors file in {folder}")
    if special:  # a pipe would block this process until somebody writes to it
        raise CheckpointError(f"{special[0]} is not a regular file")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    if name in tensors:
                        raise CheckpointError(f"{file}: tensor {name} is also in another file of the folder")
                    tensors[name] = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is not a whole safetensors file ({error}): write it again") from error
    return tensors


def tied_names(config: PreTrainedConfig) -> dict[str, str]:
    """Return weights that repeat another one, so that a folder may omit them: name -> the name it repeats."""
    if not getattr(config, "tie_word_embeddings", False):
        return {}
    keys = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._tied_weights_keys
    return dict(keys) if isinstance(keys, dict) else {}


def _kept_in_fp32(config: PreTrainedConfig) -> Callable[[str], bool]:
    """Return which tensors a model computes with in float32 whatever its dtype is, by transformers' own list.

    transformers itself would only store the values that were rounded before.
    """
    words = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._keep_in_fp32_modules_strict or ()
    return lambda name: any(word in name.split(".") for word in words)


def ignored_names(config: PreTrainedConfig) -> re.Pattern[str] | None:
    """Return which tensors of a folder the model does not load, such as layers for multi-token prediction."""
    patterns = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._keys_to_ignore_on_load_unexpected or ()
    layers = config.num_hidden_layers
    later = [rf"model\.layers\.{layers + n}\." for n in range(getattr(config, "num_nextn_predict_layers", 0) or 0)]
    return re.compile("|".join([*patterns, *later])) if patterns or later else None


def _stated_quantization(folder: Path) -> dict[str, Any] | None:
    """Return `quantization_config` of the folder's config.json, or None if it has none."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        stated = parse_json(path.read_bytes()).get("quantization_config")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a JSON object ({error}): write the folder again") from error
    if stated is not None and not isinstance(stated, dict):
        raise CheckpointError(f"{path}: quantization_config is {str(stated)[:100]}, not an object: write it again")
    return stated


def _check_quantized(
    folder: Path, tensors: dict[str, torch.Tensor], stated: dict[str, Any] | None, plan: PrecisionPlan | None
) -> None:
    """Check that codes are present only if config.json announces them and the engine was started for their format."""
    if stated is not None and plan is None:
        raise CheckpointError(
            f"{folder}: config.json has a quantization_config ({stated.get('quant_method')}), but the engine serves "
            "unquantized weights: start it with --quantization, or give it unquantized weights"
        )
    if stated is not None and plan is not None:
        check_config(stated, plan, f"{folder}/config.json")
        return
    scales = sorted(name for name in tensors if is_scale(name))
    if scales:
        raise CheckpointError(f"{folder}: tensor {scales[0]} is a scale, but config.json has no quantization_config")


def _quantized_values(
    folder: Path | str, tensors: dict[str, torch.Tensor], plan: PrecisionPlan, dtype: torch.dtype, *, coded: bool
) -> dict[str, torch.Tensor]:
    """Return the values that the engine multiplies with, under plain names.

    They are fp32 for emulated products, which round once at their end.
    """
    dtype = torch.float32 if plan.quantizes_inputs else dtype
    if coded:
        return dequantize_tensors(tensors, plan, str(folder), dtype)
    _check_values(
        folder, {name: tensor for name, tensor in tensors.items() if plan.quantized(name)}, DTYPES[plan.train]
    )
    return quantize_at_load(tensors, plan, dtype)


def _check_names(
    folder: Path | str, held: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], tied: dict[str, str]
) -> None:
    missing = sorted(expected.keys() - held.keys() - tied.keys())
    if missing:
        raise CheckpointError(f"{folder}: {_few('tensor', missing)} missing")
    unknown = sorted(held.keys() - expected.keys() - tied.keys())
    if unknown:
        raise CheckpointError(f"{folder}: {_few('tensor', unknown)} unknown to the model")
    for name, shape in held.items():
        want = expected.get(name) or expected.get(tied.get(name, ""))
        if want is not None and shape != want:
            raise CheckpointError(f"{folder}: tensor {name} has shape {shape}, the model wants {want}")


def _check_manifest(folder: Path, digests: dict[str, str], version: str | None) -> None:
    path = folder / MANIFEST
    if not path.is_file():
        return
    try:
        manifest = parse_json(path.read_bytes())
        listed, stated = dict(manifest["tensors"]), str(manifest["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a manifest with 'version' and 'tensors' ({error!r})") from error
    if version is not None and stated != version:
        raise CheckpointError(f"{path} is of version {stated}, but version {version} was asked for")
    lacking = sorted(listed.keys() - digests.keys())
    if lacking:
        raise CheckpointError(f"{folder}: {_few('tensor', lacking)} in {MANIFEST} but in no file")
    for name, digest in digests.items():
        if name not in listed:
            raise CheckpointError(f"{folder}: tensor {name} is not in {MANIFEST}")
        if listed[name] != digest:
            raise CheckpointError(
                f"{folder}: digest of tensor {name} is {digest[:12]}, {MANIFEST} says {str(listed[name])[:12]}: "
                "the file was damaged or written for another version"
            )


def _check_values(folder: Path | str, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in READABLE:
            raise CheckpointError(
                f"{folder}: tensor {name} is {tensor.dtype}; the engine reads float32, bfloat16, float16"
            )
        if not is_finite(tensor):
            raise CheckpointError(f"{folder}: tensor {name} has non-finite values")
        if tensor.dtype != dtype and not is_finite(tensor.to(dtype)):
            raise CheckpointError(f"{folder}: tensor {name} does not fit into {dtype}")


def _check_tied(folder: Path | str, tensors: dict[str, torch.Tensor], tied: dict[str, str]) -> None:
    for name, source in tied.items():
        if name in tensors and source in tensors and not torch.equal(tensors[name], tensors[source]):
            raise CheckpointError(f"{folder}: tensor {name} differs from {source}, but config.json ties them")


def _build(
    folder: Path | str, config: PreTrainedConfig, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> PreTrainedModel:
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    own = copy.deepcopy(config)  # loading writes the dtype and the attention implementation into it
    if hasattr(own, "quantization_config"):
        del own.quantization_config  # the tensors hold values here, not codes
    try:
        with _BUILDING:
            model, report = model_class.from_pretrained(
                None,
                config=own,
                state_dict=tensors,
                dtype=dtype,
                # gpt-oss has no such implementation, because of its sinks.
                attn_implementation="sdpa" if model_class._supports_sdpa else "eager",
                output_loading_info=True,
            )
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: the tensors do not fit config.json: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report[kind]:
            raise CheckpointError(f"{folder}: {kind.replace('_', ' ')}: {sorted(map(str, report[kind]))[:5]}")
    return model.eval()


def _with_parameters(like: PreTrainedModel, tensors: dict[str, torch.Tensor], tied: dict[str, str]) -> PreTrainedModel:
    """Return a copy of `like` with these parameters in place of its own.

    This is much faster than building a model, and the copy is just as independent.
    """
    fresh = {}
    for name, old in like.named_parameters():
        tensor = tensors[name] if name in tensors else tensors[tied[name]]
        fresh[id(old)] = torch.nn.Parameter(tensor, requires_grad=False)
    return copy.deepcopy(like, fresh)  # the memo maps each old parameter to its replacement


def without_values(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model with parameters on the meta device. The model itself may still be copied by others."""
    meta = {id(old): torch.nn.Parameter(old.to("meta"), requires_grad=False) for old in model.parameters()}
    return copy.deepcopy(model, meta)


def _few(noun: str, names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{noun} {names[0]}{more} {'are' if more else 'is'}"
