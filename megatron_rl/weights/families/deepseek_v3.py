"""DeepSeek-V3 and R1, Moonlight and Kimi-K2: latent attention, sigmoid router with groups, shared experts."""

from megatron_rl.weights.families.family import Family
from megatron_rl.weights.families.hf_config import HFConfig
from megatron_rl.weights.families.latent_parts import latent_rules, latent_shape
from megatron_rl.weights.families.shape import ModelShape
from megatron_rl.weights.families.sigmoid_router import first_layers_dense, mtp_names, sigmoid_experts

DEFAULTS = {
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_interleave": True,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "v_head_dim": 128,
}
QUERY_RANK = 1536


def _shape(config: HFConfig) -> ModelShape:
    return latent_shape(config, sigmoid_experts(config, first_layers_dense(config)), QUERY_RANK)


DEEPSEEK_V3 = Family(
    architectures=("DeepseekV3ForCausalLM",),
    model_type="deepseek_v3",
    shape_from_config=_shape,
    rules=latent_rules,
    defaults=DEFAULTS,
    carried=mtp_names,
)
