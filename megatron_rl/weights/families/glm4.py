"""GLM-4 (dense, 0414): norms after attention and feed-forward network, and RoPE that pairs neighboring dimensions."""

from dataclasses import replace

from megatron_rl.weights.families.family import Family, Rule
from megatron_rl.weights.families.hf_config import HFConfig
from megatron_rl.weights.families.shape import ModelShape
from megatron_rl.weights.families.table_parts import ATTENTION, HF, MCORE, attention, common_shape, table
from megatron_rl.weights.layouts import FusedGateUp, Replicated, RowParallel

DEFAULTS = {
    "attention_bias": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "intermediate_size": 13696,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1.5625e-07,
    "tie_word_embeddings": False,
}


def _shape(config: HFConfig) -> ModelShape:
    head_dim = config.integer("head_dim")
    return common_shape(
        config,
        head_dim,
        rope=replace(config.rope(head_dim, share=0.5), interleaved=True),
        qkv_bias=config.boolean("attention_bias"),  # the projection of the output never has one
        output_norms=True,
    )


def _rules(s: ModelShape) -> tuple[Rule, ...]:
    hidden, width = Replicated((s.hidden_size,)), s.ffn_hidden_size
    fc1, fc2 = MCORE + "mlp.linear_fc1.", MCORE + "mlp.linear_fc2."
    return table(
        s,
        *attention(s),
        Rule(ATTENTION + "linear_proj.output_norm.weight", (HF + "post_self_attn_layernorm.weight",), hidden),
        Rule(
            MCORE + "pre_mlp_layernorm.weight",
            (HF + "post_attention_layernorm.weight",),
            hidden,
            fused=fc1 + "layer_norm_weight",
        ),
        Rule(fc1 + "weight", (HF + "mlp.gate_up_proj.weight",), FusedGateUp(width, s.hidden_size)),
        Rule(fc2 + "weight", (HF + "mlp.down_proj.weight",), RowParallel((s.hidden_size, width), "intermediate_size")),
        Rule(fc2 + "output_norm.weight", (HF + "post_mlp_layernorm.weight",), hidden),
    )


GLM4 = Family(
    architectures=("Glm4ForCausalLM",), model_type="glm4", shape_from_config=_shape, rules=_rules, defaults=DEFAULTS
)
