"""Qwen3-MoE: Qwen3's attention, and in every layer a router with many small feed-forward networks (experts).

Hugging Face names have one tensor per expert, even if transformers keeps all experts of a layer in one parameter.
"""

from dataclasses import replace

from megatron_rl.errors import ConfigError
from megatron_rl.weights.families.family import Experts, Family, HFConfig, ModelShape, Rule
from megatron_rl.weights.families.qwen3 import HF, MCORE, read_shape, table
from megatron_rl.weights.layouts import GateUp, Replicated, RowParallel


def _shape(config: HFConfig) -> ModelShape:
    config.demand("mlp_only_layers", ([], None))
    config.demand("decoder_sparse_step", (1, None))
    config.demand("shared_expert_intermediate_size", (0, None))
    # transformers 5 has an alias for its own name of this key and may write either name.
    counts = [config.integer(key) for key in ("num_experts", "num_local_experts") if key in config.values]
    if len(set(counts)) > 1:
        raise ConfigError(
            f"{config.where}: 'num_experts' = {counts[0]} and 'num_local_experts' = {counts[1]} contradict each other"
        )
    experts = Experts(
        count=counts[0] if counts else config.integer("num_experts"),
        per_token=config.integer("num_experts_per_tok"),
        ffn_hidden_size=config.integer("moe_intermediate_size"),
        norm_topk_prob=config.boolean("norm_topk_prob"),
    )
    if experts.per_token > experts.count:
        raise ConfigError(
            f"{config.where}: 'num_experts_per_tok' = {experts.per_token} exceeds 'num_experts' = {experts.count}"
        )
    if experts.per_token == 1 and experts.norm_topk_prob:
        raise ConfigError(
            f"{config.where}: 'num_experts_per_tok' = 1 with 'norm_topk_prob' true makes every gate the constant 1: "
            "the router would never learn, which is not supported"
        )
    return replace(read_shape(config), experts=experts)


def _rules(s: ModelShape) -> tuple[Rule, ...]:
    assert s.experts is not None
    width = s.experts.ffn_hidden_size
    # Transformer Engine's grouped linears name the experts' matrices `weight0`, `weight1`...
    mcore, grouped = MCORE + "mlp.experts.local_experts.{expert}.", MCORE + "mlp.experts."
    hf = HF + "mlp.experts.{expert}."
    return table(
        s,
        (
            Rule(
                MCORE + "pre_mlp_layernorm.weight",
                (HF + "post_attention_layernorm.weight",),
                Replicated((s.hidden_size,)),
            ),
            Rule(MCORE + "mlp.router.weight", (HF + "mlp.gate.weight",), Replicated((s.experts.count, s.hidden_size))),
            Rule(
                mcore + "linear_fc1.weight",
                (hf + "gate_proj.weight", hf + "up_proj.weight"),
                GateUp(width, s.hidden_size, "moe_intermediate_size"),
                fused=grouped + "linear_fc1.weight{expert}",
            ),
            Rule(
                mcore + "linear_fc2.weight",
                (hf + "down_proj.weight",),
                RowParallel((s.hidden_size, width), "moe_intermediate_size"),
                fused=grouped + "linear_fc2.weight{expert}",
            ),
        ),
    )


QWEN3_MOE = Family(architectures=("Qwen3MoeForCausalLM",), shape_from_config=_shape, rules=_rules)
