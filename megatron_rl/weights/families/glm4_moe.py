"""GLM-4.5, 4.6 and 4.7 with experts (and Air): grouped-query attention that turns half of a head, sigmoid router."""

from megatron_rl.weights.families.family import Family, Rule
from megatron_rl.weights.families.hf_config import HFConfig
from megatron_rl.weights.families.shape import ModelShape
from megatron_rl.weights.families.sigmoid_router import first_layers_dense, mtp_layers, mtp_names, sigmoid_experts
from megatron_rl.weights.families.table_parts import (
    attention,
    common_shape,
    derived_head_dim,
    feed_forward,
    mixture,
    table,
)

DEFAULTS = {
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-5,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_qk_norm": False,
}


def _shape(config: HFConfig) -> ModelShape:
    head_dim = derived_head_dim(config)
    return common_shape(
        config,
        head_dim,
        rope=config.rope(head_dim, share=0.5),
        qk_norm=config.boolean("use_qk_norm"),
        qkv_bias=config.boolean("attention_bias"),  # the projection of the output never has one
        experts=sigmoid_experts(config, first_layers_dense(config)),
        mtp_layers=mtp_layers(config),
    )


def _rules(s: ModelShape) -> tuple[Rule, ...]:
    assert s.experts is not None
    dense = feed_forward(s, layers="dense") if s.experts.dense_layers else ()
    return table(s, *attention(s), *dense, *mixture(s))


GLM4_MOE = Family(
    architectures=("Glm4MoeForCausalLM",),
    model_type="glm4_moe",
    shape_from_config=_shape,
    rules=_rules,
    defaults=DEFAULTS,
    carried=mtp_names,
)
