"""What a model family is: the architectures it covers, how its config.json reads, and its name table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_rl.errors import ConfigError
from megatron_rl.weights.layouts import Layout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts in place of every layer's feed-forward network.

    count: experts of a layer, of which `per_token` compute a token, each `ffn_hidden_size` wide. norm_topk_prob: the gates of
    a token's experts are a softmax over them alone; otherwise over all experts, and add up to less than 1.
    """

    count: int
    per_token: int
    ffn_hidden_size: int
    norm_topk_prob: bool


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Everything about a model that its parameters and its forward pass depend on. experts: None for a dense model."""

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
    """One line of a name table: an mcore parameter and the Hugging Face tensors it is made of.

    Names hold `{layer}` where there is one per layer, and `{expert}` where there is one per expert of it. fused: the
    parameter's name under Transformer Engine's layer spec, where norms live inside the linear that follows. exported: False
    for a copy of another rule's tensor.
    """

    mcore: str
    hf: tuple[str, ...]
    layout: Layout
    fused: str | None = None
    exported: bool = True

    @property
    def stage(self) -> Literal["first", "layer", "last"]:
        """Where the parameter lives: on the first pipeline stage, in each layer, or on the last stage."""
        if "{layer}" in self.mcore:
            return "layer"
        return "first" if self.mcore.startswith("embedding.") else "last"

    @property
    def per_expert(self) -> bool:
        """Spread over expert-parallel ranks, whole experts each: tensor parallelizm does not cut it."""
        return "{expert}" in self.mcore


@dataclass(frozen=True, slots=True)
class Family:
    """architectures: names in config.json this family covers. shape_from_config: (config, where) -> ModelShape, ConfigError
    for anything unsupported. rules: the name table of a shape, in export order. ignored: endings of Hugging Face
    buffers that hold no weights."""

    architectures: tuple[str, ...]
    shape_from_config: Callable[["HFConfig"], ModelShape]
    rules: Callable[[ModelShape], tuple[Rule, ...]]
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)


class HFConfig:
    """config.json with errors that name the file and the key."""

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
        """Raise unless `key` has one of the supported values; None among them also stands for an absent key."""
        value = self.values.get(key)
        if value not in supported:
            wanted = " or ".join(repr(choice) for choice in supported if choice is not None)
            raise ConfigError(
                f"{self.where}: '{key}' is {value!r}, which is not supported; supported: {wanted or 'null'}"
            )

    def dtype(self) -> torch.dtype:
        """transformers 5 writes `dtype`, 4 wrote `torch_dtype`."""
        name = self.values.get("dtype", self.values.get("torch_dtype"))
        if name not in DTYPES:
            raise ConfigError(f"{self.where}: 'dtype' (or 'torch_dtype') is {name!r}; supported: {', '.join(DTYPES)}")
        return DTYPES[name]

    def rope_theta(self) -> float:
        """transformers 5 writes `rope_parameters`, 4 wrote `rope_theta` and `rope_scaling`; only plain RoPE is supported."""
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
        """Raise when any layer attends through a sliding window. A window that is set but switched off is fine."""
        self.demand("use_sliding_window", (False, None))
        for kind in self.values.get("layer_types") or ():
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
