"""Qwen2 and Qwen2.5 (dense): grouped-query attention with biases on queries, keys and values."""

from megatron_rl.weights.families.family import Family, Rule
from megatron_rl.weights.families.hf_config import HFConfig
from megatron_rl.weights.families.qwen3 import qwen_windows
from megatron_rl.weights.families.shape import ModelShape
from megatron_rl.weights.families.table_parts import attention, common_shape, derived_head_dim, feed_forward, table

DEFAULTS = {
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
    head_dim = derived_head_dim(config)
    return common_shape(config, head_dim, rope=config.rope(head_dim), qkv_bias=True, windows=qwen_windows(config))


def _rules(s: ModelShape) -> tuple[Rule, ...]:
    return table(s, *attention(s), *feed_forward(s))


QWEN2 = Family(
    architectures=("Qwen2ForCausalLM",), model_type="qwen2", shape_from_config=_shape, rules=_rules, defaults=DEFAULTS
)
