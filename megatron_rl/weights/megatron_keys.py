"""The keys of Megatron's `torch_dist` checkpoints: where each parameter of a name table lies in them.

A key names one tensor of the whole model. The layers of a homogeneous model are stacked: their key has no number, and
the tensor begins with a dimension of layers, after it one of experts. If dense layers stand among layers with experts,
every layer has keys of its own. Names are those of Transformer Engine's layers, whichever layers wrote the checkpoint.
"""

import re
from dataclasses import dataclass

from megatron_rl.weights.families import ModelShape
from megatron_rl.weights.name_table import Entry

_LAYER = re.compile(r"decoder\.layers\.\d+\.(.+)")
_LOCAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.\d+\.")
_PRODUCT = re.compile(r"(.*\.linear_\w+)\.weight")
EXTRA_STATE = "._extra_state/"
# Transformer Engine's latent attention keeps the norms of the narrow vectors in the products that follow.
LATENT_NORMS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


@dataclass(frozen=True, slots=True)
class MegatronPlace:
    """Where one parameter lies.

    Attributes:
        key: name of the tensor.
        index: numbers of layer and expert that lead to the parameter in it; empty if the tensor is the parameter.
        counts: how many layers and experts the leading dimensions have.
    """

    key: str
    index: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()


def is_homogeneous(shape: ModelShape) -> bool:
    """Return whether all layers are of one kind, so that their parameters are stacked."""
    return shape.experts is None or not shape.experts.dense_layers


def megatron_place(entry: Entry, shape: ModelShape) -> MegatronPlace:
    """Return where a parameter lies in a `torch_dist` checkpoint of the whole model."""
    if entry.layer is None:
        return MegatronPlace(entry.mcore)
    name = entry.mcore if entry.rule.fused is None or entry.expert is not None else entry.rule.fused
    matched = _LAYER.fullmatch(name)
    assert matched is not None, name
    rest = _LOCAL_EXPERT.sub("mlp.experts.experts.", matched[1])
    for norm, key in LATENT_NORMS.items() if shape.latent is not None else ():
        rest = rest.replace(norm, key)
    index, counts = [], []
    if is_homogeneous(shape):
        index.append(entry.layer)
        counts.append(shape.num_layers)
        key = f"decoder.layers.{rest}"
    else:
        key = f"decoder.layers.{entry.layer}.{rest}"
    if entry.expert is not None and shape.experts is not None:
        index.append(entry.expert)
        counts.append(shape.experts.count)
    return MegatronPlace(key, tuple(index), tuple(counts))


def extra_state_key(entry: Entry, place: MegatronPlace) -> str | None:
    """Return the key of the empty state that Transformer Engine keeps beside a product. None beside other tensors."""
    product = _PRODUCT.fullmatch(place.key)
    if product is None or entry.layer is None:
        return None
    index, counts = (place.index, place.counts) if place.index else ((0,), (1,))
    return f"{product[1]}{EXTRA_STATE}shard_{'.'.join(map(str, index))}_{'.'.join(map(str, counts))}"
