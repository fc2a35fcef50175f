"""Llama 2 and 3.x: grouped-query attention without biases or norms on queries and keys."""

from megatron_rl.weights.families.family import Family, Rule
from megatron_rl.weights.families.hf_config import HFConfig
from megatron_rl.weights.families.shape import ModelShape
from megatron_rl.weights.families.table_parts import attention, common_shape, derived_head_dim, feed_forward, table

DEFAULTS = {
    "attention_bias": False,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def _shape(config: HFConfig) -> ModelShape:
    config.demand("attention_bias", (False,))
    config.demand("mlp_bias", (False,))
    head_dim = derived_head_dim(config)
    return common_shape(config, head_dim, rope=config.rope(head_dim))


def _rules(s: ModelShape) -> tuple[Rule, ...]:
    return table(s, *attention(s), *feed_forward(s))


LLAMA = Family(
    architectures=("LlamaForCausalLM",), model_type="llama", shape_from_config=_shape, rules=_rules, defaults=DEFAULTS
)
