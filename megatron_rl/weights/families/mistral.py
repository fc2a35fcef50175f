"""Mistral: Llama's layers, in which a query may see only a window of keys."""

from megatron_rl.weights.families.family import Family, Rule
from megatron_rl.weights.families.hf_config import HFConfig
from megatron_rl.weights.families.shape import ModelShape
from megatron_rl.weights.families.table_parts import attention, common_shape, derived_head_dim, feed_forward, table

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def _shape(config: HFConfig) -> ModelShape:
    head_dim = derived_head_dim(config)
    return common_shape(config, head_dim, rope=config.rope(head_dim), windows=mistral_windows(config, default=4096))


def mistral_windows(config: HFConfig, default: int | None) -> tuple[int | None, ...]:
    """Return the attention windows of a Mistral model. null switches the window off; an absent key has a default."""
    layers = config.integer("num_hidden_layers")
    stated = config.get("sliding_window")
    width = default if "sliding_window" not in config.values else stated
    if width is not None and stated is not None:
        width = config.integer("sliding_window")
    return config.windows(layers, width)


def _rules(s: ModelShape) -> tuple[Rule, ...]:
    return table(s, *attention(s), *feed_forward(s))


MISTRAL = Family(
    architectures=("MistralForCausalLM",),
    model_type="mistral",
    shape_from_config=_shape,
    rules=_rules,
    defaults=DEFAULTS,
)
