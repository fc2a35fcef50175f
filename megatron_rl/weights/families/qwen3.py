"""Qwen3 (dense): grouped-query attention with normalized queries and keys, gated SiLU feed-forward network."""

from typing import Any

from megatron_rl.weights.families.family import Family, Rule
from megatron_rl.weights.families.hf_config import HFConfig
from megatron_rl.weights.families.shape import ModelShape
from megatron_rl.weights.families.table_parts import attention, common_shape, feed_forward, table

DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}


def _shape(config: HFConfig) -> ModelShape:
    config.demand("attention_bias", (False,))
    head_dim = config.integer("head_dim")
    return common_shape(config, head_dim, rope=config.rope(head_dim), qk_norm=True, windows=qwen_windows(config))


def qwen_windows(config: HFConfig) -> tuple[int | None, ...]:
    """Return the attention windows of a Qwen model. Layers from `max_window_layers` on have one, if they are in use."""
    layers = config.integer("num_hidden_layers")
    if not config.boolean("use_sliding_window"):
        return config.windows(layers, None)
    width = config.integer("sliding_window")
    if config.get("layer_types") is not None:
        return config.windows(layers, width)
    first = config.integer("max_window_layers", least=0)
    return tuple(None if layer < first else width for layer in range(layers)) if first < layers else ()


def _rules(s: ModelShape) -> tuple[Rule, ...]:
    return table(s, *attention(s), *feed_forward(s))


QWEN3 = Family(
    architectures=("Qwen3ForCausalLM",), model_type="qwen3", shape_from_config=_shape, rules=_rules, defaults=DEFAULTS
)
