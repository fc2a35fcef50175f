"""A model family: the architectures it covers, how its config.json is read, and its name table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_rl.weights.families.hf_config import HFConfig
from megatron_rl.weights.families.shape import ModelShape
from megatron_rl.weights.layouts import Layout


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a name table: an mcore parameter and the Hugging Face tensors it is built from.

    Names contain `{layer}` if there is one per layer, and `{expert}` if there is one per expert of a layer.

    Attributes:
        mcore: the parameter's name under the local layer spec.
        hf: names of the Hugging Face tensors, in the order of the layout.
        layout: how the parameter is built and sharded.
        fused: the parameter's name under Transformer Engine's layer spec, where norms are part of the linear that
            follows.
        exported: False for a copy of another rule's tensor.
        layers: the layers that have the parameter: all, those with a plain feed-forward network, or those with experts.
        other: for each of `hf`, its name in folders that transformers 5 writes in its own format. For an expert it is
            the tensor of all experts of the layer; tensors with the same name lie one below the other in it.
        buffer: it is a buffer, which is neither trained nor cast.
        stacked: the one Hugging Face tensor holds those of all experts of a layer: [experts, *shape of the layout].
    """

    mcore: str
    hf: tuple[str, ...]
    layout: Layout
    fused: str | None = None
    exported: bool = True
    layers: Literal["all", "dense", "experts"] = "all"
    other: tuple[str, ...] | None = None
    buffer: bool = False
    stacked: bool = False

    @property
    def stage(self) -> Literal["first", "layer", "last"]:
        """Where the parameter is: on the first pipeline stage, in each layer, or on the last stage."""
        if "{layer}" in self.mcore:
            return "layer"
        return "first" if self.mcore.startswith("embedding.") else "last"

    @property
    def per_expert(self) -> bool:
        """Whether there is one parameter per expert.

        Whole experts are distributed over the expert-parallel ranks; tensor parallelism does not shard them.
        """
        return "{expert}" in self.mcore

    def in_layer(self, shape: ModelShape, layer: int) -> bool:
        """Return whether a layer (from 0) has the parameter."""
        return self.layers == "all" or (self.layers == "experts") == shape.has_experts(layer)


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models that share one name table.

    Attributes:
        architectures: names in config.json that this family covers.
        model_type: the family's name in config.json, which counts where no architecture is named.
        defaults: defaults of transformers' configuration class, for keys that a config.json may leave out.
        shape_from_config: returns the ModelShape of a config.json. Raises ConfigError for anything unsupported.
        rules: returns the name table of a shape, in export order.
        ignored: name endings of Hugging Face buffers that hold no weights.
        carried: returns the beginnings of the names of tensors that a folder may hold and that the trainer does not
            use. They are copied into written folders.
    """

    architectures: tuple[str, ...]
    model_type: str
    shape_from_config: Callable[[HFConfig], ModelShape]
    rules: Callable[[ModelShape], tuple[Rule, ...]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    carried: Callable[[ModelShape], tuple[str, ...]] = lambda shape: ()
