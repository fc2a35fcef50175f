"""gpt-oss: windows in every second layer, attention sinks, biases everywhere, and experts with a clamped activation.

The matrices of all experts of a layer are one stored tensor, transposed, with gate and up columns in turn. This is the
only form in which they are stored, so exports write it.
"""

from megatron_rl.errors import ConfigError
from megatron_rl.weights.families.family import Family, Rule
from megatron_rl.weights.families.hf_config import HFConfig
from megatron_rl.weights.families.shape import Experts, ModelShape
from megatron_rl.weights.families.table_parts import ATTENTION, HF, MCORE, attention, check_choice, common_shape, table
from megatron_rl.weights.layouts import HeadRows, InterleavedGateUp, Layout, Replicated, Transposed

DEFAULTS = {
    "attention_bias": True,
    "head_dim": 64,
    "hidden_act": "silu",
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "rms_norm_eps": 1e-5,
    "sliding_window": 128,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
}


def _shape(config: HFConfig) -> ModelShape:
    config.demand("attention_bias", (True,))
    # The constants of megatron-core's activation and of the released models.
    config.demand("swiglu_alpha", (1.702,))
    config.demand("swiglu_limit", (7.0,))
    if not config.values.get("rope_parameters") and not config.values.get("rope_scaling"):
        raise ConfigError(
            f"{config.where}: neither 'rope_parameters' nor 'rope_scaling' is there: gpt-oss is trained with YaRN, and "
            "its constants are needed"
        )
    layers, head_dim = config.integer("num_hidden_layers"), config.integer("head_dim")
    experts = Experts(
        count=config.either("num_local_experts", "num_experts"),
        per_token=config.either("num_experts_per_tok", "experts_per_token"),
        ffn_hidden_size=config.integer("intermediate_size"),
        norm_topk_prob=True,
        biases=True,
    )
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
    return common_shape(
        config,
        head_dim,
        rope=config.rope(head_dim, theta=150000.0),
        qkv_bias=True,
        out_bias=True,
        windows=config.windows(layers, config.integer("sliding_window"), kinds),
        sinks=True,
        activation="gpt_oss",
        experts=check_choice(experts, config.where),
    )


def _rules(s: ModelShape) -> tuple[Rule, ...]:
    assert s.experts is not None
    hidden, width, count = s.hidden_size, s.experts.ffn_hidden_size, s.experts.count
    here = MCORE + "mlp.router."
    return table(
        s,
        *attention(s),
        Rule(ATTENTION + "core_attention.softmax_offset", (HF + "self_attn.sinks",), HeadRows(s.num_heads, 1, ())),
        Rule(MCORE + "pre_mlp_layernorm.weight", (HF + "post_attention_layernorm.weight",), Replicated((hidden,))),
        Rule(here + "weight", (HF + "mlp.router.weight",), Replicated((count, hidden))),
        Rule(here + "bias", (HF + "mlp.router.bias",), Replicated((count,))),
        _expert("linear_fc1.weight", "gate_up_proj", InterleavedGateUp(width, (hidden,))),
        _expert("linear_fc1.bias", "gate_up_proj_bias", InterleavedGateUp(width, ())),
        _expert("linear_fc2.weight", "down_proj", Transposed((width, hidden))),
        _expert("linear_fc2.bias", "down_proj_bias", Replicated((hidden,))),
    )


def _expert(mcore: str, name: str, layout: Layout) -> Rule:
    experts = MCORE + "mlp.experts."
    return Rule(
        f"{experts}local_experts.{{expert}}.{mcore}",
        (f"{HF}mlp.experts.{name}",),
        layout,
        fused=f"{experts}{mcore}{{expert}}",
        stacked=True,
    )


GPT_OSS = Family(
    architectures=("GptOssForCausalLM",),
    model_type="gpt_oss",
    shape_from_config=_shape,
    rules=_rules,
    defaults=DEFAULTS,
)
