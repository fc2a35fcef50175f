"""The name table of one model, with its layers and experts filled in.

It is checked against a folder's headers before a model exists, and against the model's chunks afterwards.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from megatron_rl.alp.names import is_sigma
from megatron_rl.errors import CheckpointError, ConfigError
from megatron_rl.weights.families import Family, HFConfig, ModelShape, Rule, family_of
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.layouts import check_divides

_COMPARE_BYTES = 64 * 2**20
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GIVE_PLAIN = "a quantized checkpoint cannot be trained, give the float32, bfloat16 or float16 one"
# The index of an expert in the name of a layer's parameter: `local_experts.3.linear_fc1.weight`, or with Transformer
# Engine `linear_fc1.weight3`.
_EXPERT = re.compile(r"(mlp\.experts\.(?:local_experts\.|linear_fc[12]\.weight))(\d+)(|\..*)")


@dataclass(frozen=True, slots=True)
class Entry:
    """A rule with its layer and expert filled in. Both are global indices; None outside the layers and the experts."""

    rule: Rule
    layer: int | None
    expert: int | None = None

    @property
    def mcore(self) -> str:
        return self.rule.mcore

    def cut(self, tensor_parallel: int) -> int:
        """Return how many ranks hold a shard of the parameter. This is 1 for an expert: it is whole on its rank."""
        return tensor_parallel if self.expert is None else 1


def entries(family: Family, shape: ModelShape) -> tuple[Entry, ...]:
    """Return every parameter of the whole model in export order: first stage, layer after layer, last stage."""
    rules = family.rules(shape)
    layered = [rule for rule in rules if rule.stage == "layer"]
    return (
        *(Entry(rule, None) for rule in rules if rule.stage == "first"),
        *(entry for layer in range(shape.num_layers) for rule in layered for entry in _in_layer(rule, layer, shape)),
        *(Entry(rule, None) for rule in rules if rule.stage == "last"),
    )


def check_folder(folder: HFFolder, *, tensor_parallel: int, expert_parallel: int = 1) -> tuple[Family, ModelShape]:
    """Check a folder against its family's name table, from the headers alone, before any model is built.

    Only one check reads tensor data: an `lm_head.weight` that is stored although the embeddings are tied must be
    identical to the embedding.

    Args:
        folder: the folder to check.
        tensor_parallel: number of tensor-parallel ranks.
        expert_parallel: number of expert-parallel ranks.

    Returns:
        The model's family and shape.

    Raises:
        ConfigError: if the model is not supported, or if the tensor- or expert-parallel size does not divide it.
        CheckpointError: if a tensor is missing, is unknown or has a wrong shape.
    """
    where = str(folder.path / "config.json")
    family = family_of(folder.config, where)
    _check_quantization(folder)
    shape = family.shape_from_config(HFConfig(folder.config, where))
    plan = entries(family, shape)
    cut = [entry for entry in plan if entry.expert is None]
    check_divides({key: count for entry in cut for key, count in entry.rule.layout.units.items()}, tensor_parallel)
    _check_experts(shape, expert_parallel, where)
    known = {name for entry in plan for name in entry.rule.hf}
    for entry in plan:
        for name, expected in zip(entry.rule.hf, entry.rule.layout.shapes, strict=True):
            _check_tensor(folder, name, expected)
    for name, info in folder.tensors.items():
        if name in known or name.endswith(family.ignored):
            continue
        if name == "lm_head.weight" and shape.tied_embeddings:
            _check_tied(folder, name, "model.embed_tokens.weight")
            continue
        raise CheckpointError(
            f"tensor '{name}' in {info.file} is not in the table of {family.architectures[0]} with "
            f"{shape.num_layers} layers: the weights and {where} do not belong together, or the model is not supported"
        )
    return family, shape


def local_parameters(chunks: Sequence[nn.Module], plan: Sequence[Entry]) -> dict[str, tuple[Entry, nn.Parameter]]:
    """Return the parameters this rank holds, by their global mcore name under the local layer spec.

    `chunks` are GPTModels, one per virtual pipeline stage, wrapped (DistributedDataParallel, Float16Module) or not. The
    scales of a perturbation (`is_sigma`) are not part of the model and are left out.

    Raises:
        CheckpointError: if a parameter has no rule, or if the model lacks the parameter of a rule.
    """
    by_name = {name: entry for entry in plan for name in (entry.rule.mcore, entry.rule.fused) if name is not None}
    held: dict[str, tuple[Entry, nn.Parameter]] = {}
    for chunk in chunks:
        body = _unwrap(chunk)
        for name, parameter in body.named_parameters():
            if is_sigma(name):
                continue
            entry = by_name.get(_global_name(body, name))
            if entry is None:
                raise CheckpointError(
                    f"parameter '{_global_name(body, name)}' of the model has no rule in the name table of its family"
                )
            if entry.mcore in held:
                raise CheckpointError(
                    f"parameter '{entry.mcore}' is in two chunks of this rank: the chunks do not form one model"
                )
            held[entry.mcore] = (entry, parameter)
        absent = [entry.mcore for entry in _expected(body, plan) if entry.mcore not in held]
        if absent:
            raise CheckpointError(
                f"the model has no parameter '{absent[0]}', which its checkpoint holds: "
                "build it from the same config.json"
            )
    return held


def _in_layer(rule: Rule, layer: int, shape: ModelShape) -> Iterator[Entry]:
    experts = range(shape.experts.count) if rule.per_expert and shape.experts is not None else (None,)
    for expert in experts:

        def fill(name: str, expert: int | None = expert) -> str:
            return name.replace("{layer}", str(layer)).replace("{expert}", str(expert))

        fused = None if rule.fused is None else fill(rule.fused)
        filled = replace(rule, mcore=fill(rule.mcore), hf=tuple(fill(name) for name in rule.hf), fused=fused)
        yield Entry(filled, layer, expert)


def _check_experts(shape: ModelShape, expert_parallel: int, where: str) -> None:
    if shape.experts is None and expert_parallel > 1:
        raise ConfigError(
            f"parallel.expert = {expert_parallel} spreads experts, and {where} is a dense model: set it to 1"
        )
    if shape.experts is not None and shape.experts.count % expert_parallel:
        raise ConfigError(
            f"parallel.expert = {expert_parallel} does not divide num_experts = {shape.experts.count} of {where}"
        )


def _check_tensor(folder: HFFolder, name: str, expected: tuple[int, ...]) -> None:
    info = folder.tensors.get(name)
    if info is None:
        raise CheckpointError(
            f"{folder.path} has no tensor '{name}', which its config.json asks for (shape {list(expected)})"
        )
    if info.shape != expected:
        raise CheckpointError(
            f"tensor '{name}' in {info.file} has shape {list(info.shape)}, but config.json asks for {list(expected)}"
        )
    if info.dtype not in _WEIGHT_DTYPES:
        held = str(info.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"tensor '{name}' in {info.file} is {held}: only float32, bfloat16 and float16 weights are trained; "
            + ("convert it to float32" if info.dtype == torch.float64 else _GIVE_PLAIN)
        )


def _check_quantization(folder: HFFolder) -> None:
    """Check that the folder holds plain weights, and that its config.json does not say otherwise."""
    record = folder.config.get("quantization_config")
    if record is None:
        return
    method = record.get("quant_method") if isinstance(record, dict) else None
    codes = [
        name for name, info in folder.tensors.items() if not info.dtype.is_floating_point or info.dtype.itemsize < 2
    ]
    if codes:
        held = f"'{codes[0]}' is {folder.tensors[codes[0]].dtype}"
        raise CheckpointError(f"{folder.path} is quantized with {method!r} ({held}): {_GIVE_PLAIN}")
    raise CheckpointError(
        f"{folder.path}/config.json has a 'quantization_config' ({method!r}), but every tensor is plain: engines would "
        "take the weights for codes. Remove this key from config.json"
    )


def _check_tied(folder: HFFolder, head: str, embedding: str) -> None:
    a, b = folder.tensors[head], folder.tensors[embedding]
    same = a.shape == b.shape
    wider = torch.promote_types(a.dtype, b.dtype)
    rows = max(1, _COMPARE_BYTES // max(1, b.nbytes // b.shape[0]))
    for start in range(0, b.shape[0] if same else 0, rows):
        stop = min(start + rows, b.shape[0])
        of_head, of_embedding = (folder.read_rows(name, start, stop).to(wider) for name in (head, embedding))
        if not torch.equal(of_head, of_embedding):
            same = False
            break
    if not same:
        raise CheckpointError(
            f"tensor '{head}' in {a.file} differs from '{embedding}' although config.json ties them: "
            "set tie_word_embeddings to false, or remove the tensor"
        )


def _unwrap(chunk: nn.Module) -> Any:
    body: Any = chunk
    while not hasattr(body, "decoder"):
        if not hasattr(body, "module"):
            raise CheckpointError(f"a model chunk is a {type(chunk).__name__} without a decoder: a GPTModel is needed")
        body = body.module
    return body


def _global_name(body: Any, name: str) -> str:
    """Return the global name of a parameter with local indices.

    A pipeline stage numbers its own layers from 0, and an expert-parallel rank its own experts.
    """
    head, _, rest = name.partition("decoder.layers.")
    if head or not rest:
        return name
    index, _, rest = rest.partition(".")
    layer = body.decoder.layers[int(index)]
    expert = _EXPERT.fullmatch(rest)
    if expert is not None:
        rest = f"{expert[1]}{layer.mlp.local_expert_indices[int(expert[2])]}{expert[3]}"
    return f"decoder.layers.{layer.layer_number - 1}.{rest}"


def _expected(body: Any, plan: Sequence[Entry]) -> Iterator[Entry]:
    """Yield the entries a chunk must hold, by what the chunk is: first stage, last stage, which layers."""
    layers = {layer.layer_number - 1: layer for layer in body.decoder.layers}
    for entry in plan:
        if entry.layer is not None:
            wanted = entry.layer in layers and (
                entry.expert is None or entry.expert in layers[entry.layer].mlp.local_expert_indices
            )
        elif entry.rule.stage == "first":
            wanted = body.pre_process
        else:  # a tied model on one stage has no output layer of its own
            wanted = body.post_process and (entry.rule.exported or not body.pre_process)
        if wanted:
            yield entry
