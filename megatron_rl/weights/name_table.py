"""The name table of one model, with its layers and experts filled in, and the model's parameters by its names."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from megatron_rl.alp.names import is_sigma
from megatron_rl.errors import CheckpointError
from megatron_rl.weights.families import Family, ModelShape, Rule

# The index of an expert in the name of a layer's parameter: `local_experts.3.linear_fc1.weight`, or with Transformer
# Engine `linear_fc1.weight3`.
_EXPERT = re.compile(r"(mlp\.experts\.(?:local_experts\.|linear_fc[12]\.(?:weight|bias)))(\d+)(|\..*)")


@dataclass(frozen=True, slots=True)
class Entry:
    """A rule with its layer and expert filled in. Both are global indices; None outside the layers and the experts."""

    rule: Rule
    layer: int | None
    expert: int | None = None

    @property
    def mcore(self) -> str:
        return self.rule.mcore

    def stored_shapes(self, shape: ModelShape) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the Hugging Face tensors of the entry."""
        if not self.rule.stacked or shape.experts is None:
            return self.rule.layout.shapes
        return tuple((shape.experts.count, *part) for part in self.rule.layout.shapes)

    def cut(self, tensor_parallel: int) -> int:
        """Return how many ranks hold a shard of the parameter. This is 1 for an expert: it is whole on its rank."""
        return tensor_parallel if self.expert is None else 1


def entries(family: Family, shape: ModelShape) -> tuple[Entry, ...]:
    """Return every parameter of the whole model in export order: first stage, layer after layer, last stage."""
    rules = family.rules(shape)
    layered = [rule for rule in rules if rule.stage == "layer"]
    return (
        *(Entry(rule, None) for rule in rules if rule.stage == "first"),
        *(
            entry
            for layer in range(shape.num_layers)
            for rule in layered
            if rule.in_layer(shape, layer)
            for entry in _in_layer(rule, layer, shape)
        ),
        *(Entry(rule, None) for rule in rules if rule.stage == "last"),
    )


def local_tensors(chunks: Sequence[nn.Module], plan: Sequence[Entry]) -> dict[str, tuple[Entry, Tensor]]:
    """Return the parameters and buffers this rank holds, by their global mcore name under the local layer spec.

    `chunks` are GPTModels, one per virtual pipeline stage, wrapped (DistributedDataParallel, Float16Module) or not. The
    scales of a perturbation (`is_sigma`) are not part of the model and are left out, and so are buffers without a rule.

    Raises:
        CheckpointError: if a parameter has no rule, or if the model lacks the parameter of a rule.
    """
    by_name = {name: entry for entry in plan for name in (entry.rule.mcore, entry.rule.fused) if name is not None}
    held: dict[str, tuple[Entry, Tensor]] = {}
    for chunk in chunks:
        body = _unwrap(chunk)
        for name, tensor in (*body.named_parameters(), *body.named_buffers()):
            entry = by_name.get(_global_name(body, name))
            if is_sigma(name) or (entry is None and not isinstance(tensor, nn.Parameter)):
                continue
            if entry is None:
                raise CheckpointError(
                    f"parameter '{_global_name(body, name)}' of the model has no rule in the name table of its family"
                )
            if entry.mcore in held:
                raise CheckpointError(
                    f"parameter '{entry.mcore}' is in two chunks of this rank: the chunks do not form one model"
                )
            held[entry.mcore] = (entry, tensor)
        absent = [entry.mcore for entry in _expected(body, plan) if entry.mcore not in held]
        if absent:
            raise CheckpointError(
                f"the model has no parameter '{absent[0]}', which its checkpoint holds: "
                "build it from the same config.json"
            )
    return held


def _in_layer(rule: Rule, layer: int, shape: ModelShape) -> Iterator[Entry]:
    filled = _fill(rule, "{layer}", layer)
    if not rule.per_expert or shape.experts is None:
        yield Entry(filled, layer)
        return
    for expert in range(shape.experts.count):
        yield Entry(_fill(filled, "{expert}", expert), layer, expert)


def _fill(rule: Rule, place: str, number: int) -> Rule:
    """Return the rule with a number in its names. Large models have 60,000 experts, so this counts."""
    text = str(number)
    return replace(
        rule,
        mcore=rule.mcore.replace(place, text),
        hf=tuple([name.replace(place, text) for name in rule.hf]),
        fused=rule.fused and rule.fused.replace(place, text),
        other=rule.other and tuple([name.replace(place, text) for name in rule.other]),
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
