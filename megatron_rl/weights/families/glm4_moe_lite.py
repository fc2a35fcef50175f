"""GLM-4.7-Flash: DeepSeek-V3's layers under another name."""

from megatron_rl.errors import ConfigError
from megatron_rl.weights.families.family import Family
from megatron_rl.weights.families.hf_config import HFConfig
from megatron_rl.weights.families.latent_parts import latent_rules, latent_shape
from megatron_rl.weights.families.shape import ModelShape
from megatron_rl.weights.families.sigmoid_router import mtp_names, sigmoid_experts

DEFAULTS = {
    "attention_bias": False,
    "hidden_act": "silu",
    "intermediate_size": 10240,
    "kv_lora_rank": 512,
    "max_position_embeddings": 202752,
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 4,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_interleave": True,
    "routed_scaling_factor": 1.8,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "v_head_dim": 256,
}
QUERY_RANK = 768


def _shape(config: HFConfig) -> ModelShape:
    config.demand("first_k_dense_replace", (1, None))  # its class does not read this key, and engines might
    return latent_shape(config, sigmoid_experts(config, _dense_layers(config)), QUERY_RANK)


def _dense_layers(config: HFConfig) -> frozenset[int]:
    layers, kinds = config.integer("num_hidden_layers"), config.get("mlp_layer_types")
    if kinds is None:
        return frozenset({0})
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {"dense", "sparse"}:
        raise ConfigError(
            f"{config.where}: 'mlp_layer_types' is {kinds!r}, 'dense' or 'sparse' for each of {layers} layers is needed"
        )
    return frozenset(layer for layer, kind in enumerate(kinds) if kind == "dense")


GLM4_MOE_LITE = Family(
    architectures=("Glm4MoeLiteForCausalLM",),
    model_type="glm4_moe_lite",
    shape_from_config=_shape,
    rules=latent_rules,
    defaults=DEFAULTS,
    carried=mtp_names,
)
