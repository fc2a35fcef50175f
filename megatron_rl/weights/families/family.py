"""A model family: the architectures it covers, how its config.json is read, and its name table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_rl.errors import ConfigError
from megatron_rl.weights.layouts import Layout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts that replaces every layer's feed-forward network.

    Attributes:
        count: experts per layer.
        per_token: experts that compute each token.
        ffn_hidden_size: width of each expert.
        norm_topk_prob: the gates of a token's experts are a softmax over these experts only. Otherwise the softmax is
            over all experts, and the gates add up to less than 1.
    """

    count: int
    per_token: int
    ffn_hidden_size: int
    norm_topk_prob: bool


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Everything that a model's parameters and forward pass depend on. `experts` is None for a dense model."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    qk_norm: bool
    qkv_bias: bool
    tied_embeddings: bool
    max_position_embeddings: int
    dtype: torch.dtype
    experts: Experts | None = None


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
    """

    mcore: str
    hf: tuple[str, ...]
    layout: Layout
    fused: str | None = None
    exported: bool = True

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


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models that share one name table.

    Attributes:
        architectures: names in config.json that this family covers.
        shape_from_config: returns the ModelShape of a config.json. Raises ConfigError for anything unsupported.
        rules: returns the name table of a shape, in export order.
        ignored: name endings of Hugging Face buffers that hold no weights.
    """

    architectures: tuple[str, ...]
    shape_from_config: Callable[["HFConfig"], ModelShape]
    rules: Callable[[ModelShape], tuple[Rule, ...]]
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)


class HFConfig:
    """The values of a config.json. Errors name the file and the key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def integer(self, key: str) -> int:
        value = self._required(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{self.where}: '{key}' is {value!r}, a positive integer is needed")
        return value

    def number(self, key: str) -> float:
        return self._as_number(key, self._required(key))

    def boolean(self, key: str) -> bool:
        value = self._required(key)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: '{key}' is {value!r}, true or false is needed")
        return value

    def demand(self, key: str, supported: tuple[Any, ...]) -> None:
        """Check that `key` has one of the supported values. Raise ConfigError if it does not.

        None among the supported values also stands for an absent key.
        """
        value = self.values.get(key)
        if value not in supported:
            wanted = " or ".join(repr(choice) for choice in supported if choice is not None)
            raise ConfigError(
                f"{self.where}: '{key}' is {value!r}, which is not supported; supported: {wanted or 'null'}"
            )

    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights. transformers 5 writes `dtype`, 4 wrote `torch_dtype`."""
        name = self.values.get("dtype", self.values.get("torch_dtype"))
        if name not in DTYPES:
            raise ConfigError(f"{self.where}: 'dtype' (or 'torch_dtype') is {name!r}; supported: {', '.join(DTYPES)}")
        return DTYPES[name]

    def rope_theta(self) -> float:
        """Return the base of RoPE. Only plain RoPE is supported.

        transformers 5 writes `rope_parameters`, 4 wrote `rope_theta` and `rope_scaling`.
        """
        parameters = self.values.get("rope_parameters") or {}
        scaling = self.values.get("rope_scaling") or {}
        for key, found in (("rope_parameters", parameters), ("rope_scaling", scaling)):
            if not isinstance(found, Mapping):
                raise ConfigError(f"{self.where}: '{key}' is {found!r}, a mapping is needed")
            kind = found.get("rope_type", found.get("type", "default"))
            if kind != "default":
                raise ConfigError(
                    f"{self.where}: '{key}' asks for {kind!r} RoPE, which is not supported; supported: 'default'"
                )
        if "rope_theta" in parameters:
            return self._as_number("rope_parameters.rope_theta", parameters["rope_theta"])
        return self.number("rope_theta")

    def no_sliding_window(self) -> None:
        """Check that no layer uses sliding-window attention. A window that is set but switched off is allowed."""
        self.demand("use_sliding_window", (False, None))
        kinds, layers = self.values.get("layer_types") or (), self.integer("num_hidden_layers")
        if not isinstance(kinds, (list, tuple)) or len(kinds) not in (0, layers):
            raise ConfigError(
                f"{self.where}: 'layer_types' is {kinds!r}, one word for each of {layers} layers is needed"
            )
        for kind in kinds:
            if kind != "full_attention":
                raise ConfigError(
                    f"{self.where}: 'layer_types' holds {kind!r}, which is not supported; supported: 'full_attention'"
                )

    def _required(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise ConfigError(f"{self.where}: key '{key}' is missing")
        return self.values[key]

    def _as_number(self, key: str, value: Any) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{self.where}: '{key}' is {value!r}, a positive number is needed")
        return float(value)
