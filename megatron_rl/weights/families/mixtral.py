"""Mixtral: Llama's attention, and a few wide experts in every layer."""

from megatron_rl.weights.families.family import Family, Rule
from megatron_rl.weights.families.hf_config import HFConfig
from megatron_rl.weights.families.mistral import mistral_windows
from megatron_rl.weights.families.shape import Experts, ModelShape
from megatron_rl.weights.families.table_parts import (
    attention,
    check_choice,
    common_shape,
    derived_head_dim,
    mixture,
    table,
)

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-5,
    "router_jitter_noise": 0.0,
    "tie_word_embeddings": False,
}


def _shape(config: HFConfig) -> ModelShape:
    config.demand("router_jitter_noise", (0.0,))
    head_dim = derived_head_dim(config)
    experts = Experts(
        count=config.integer("num_local_experts"),
        per_token=config.integer("num_experts_per_tok"),
        ffn_hidden_size=config.integer("intermediate_size"),
        norm_topk_prob=True,
    )
    return common_shape(
        config,
        head_dim,
        rope=config.rope(head_dim, theta=1e6),
        windows=mistral_windows(config, default=None),
        experts=check_choice(experts, config.where),
    )


def _rules(s: ModelShape) -> tuple[Rule, ...]:
    return table(s, *attention(s), *mixture(s, "block_sparse_moe.", ("w1", "w3", "w2"), "intermediate_size"))


MIXTRAL = Family(
    architectures=("MixtralForCausalLM",),
    model_type="mixtral",
    shape_from_config=_shape,
    rules=_rules,
    defaults=DEFAULTS,
)
