"""Qwen3-MoE: Qwen3's attention, and in most layers a router with many small feed-forward networks (experts).

Hugging Face names have one tensor per expert, even if transformers keeps all experts of a layer in one parameter.
"""

from megatron_rl.errors import ConfigError
from megatron_rl.weights.families.family import Family, Rule
from megatron_rl.weights.families.hf_config import HFConfig
from megatron_rl.weights.families.shape import Experts, ModelShape
from megatron_rl.weights.families.table_parts import (
    attention,
    check_choice,
    common_shape,
    derived_head_dim,
    feed_forward,
    mixture,
    table,
)

DEFAULTS = {
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "intermediate_size": 6144,
    "max_position_embeddings": 32768,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}


def _shape(config: HFConfig) -> ModelShape:
    config.demand("attention_bias", (False,))
    config.demand("shared_expert_intermediate_size", (0, None))
    head_dim = derived_head_dim(config)
    window = config.integer("sliding_window") if config.boolean("use_sliding_window") else None
    experts = Experts(
        # transformers 5 has an alias for its own name of this key and may write either name.
        count=config.either("num_experts", "num_local_experts"),
        per_token=config.integer("num_experts_per_tok"),
        ffn_hidden_size=config.integer("moe_intermediate_size"),
        norm_topk_prob=config.boolean("norm_topk_prob"),
        dense_layers=_dense_layers(config),
    )
    return common_shape(
        config,
        head_dim,
        rope=config.rope(head_dim),
        qk_norm=True,
        windows=config.windows(config.integer("num_hidden_layers"), window),
        experts=check_choice(experts, config.where),
    )


def _dense_layers(config: HFConfig) -> frozenset[int]:
    layers, step = config.integer("num_hidden_layers"), config.integer("decoder_sparse_step")
    listed = config.get("mlp_only_layers")
    if not isinstance(listed, list) or not all(isinstance(layer, int) and 0 <= layer < layers for layer in listed):
        raise ConfigError(f"{config.where}: 'mlp_only_layers' is {listed!r}, a list of layers below {layers} is needed")
    dense = frozenset(layer for layer in range(layers) if layer in listed or (layer + 1) % step)
    if len(dense) == layers:
        raise ConfigError(f"{config.where}: no layer is left with experts: give the dense model's config.json")
    return dense


def _rules(s: ModelShape) -> tuple[Rule, ...]:
    assert s.experts is not None
    dense = feed_forward(s, layers="dense") if s.experts.dense_layers else ()
    return table(s, *attention(s), *dense, *mixture(s))


QWEN3_MOE = Family(
    architectures=("Qwen3MoeForCausalLM",),
    model_type="qwen3_moe",
    shape_from_config=_shape,
    rules=_rules,
    defaults=DEFAULTS,
)
