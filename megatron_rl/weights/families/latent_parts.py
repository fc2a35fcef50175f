"""Parts that models with multi-head latent attention (MLA) have in common: their shape and the rules of attention."""

from megatron_rl.errors import ConfigError
from megatron_rl.weights.families.family import Rule
from megatron_rl.weights.families.hf_config import HFConfig
from megatron_rl.weights.families.shape import Experts, Latent, ModelShape
from megatron_rl.weights.families.sigmoid_router import mtp_layers
from megatron_rl.weights.families.table_parts import ATTENTION, HF, MCORE, common_shape, feed_forward, mixture, table
from megatron_rl.weights.layouts import HeadRows, Replicated, RowParallel

# The norms of the narrow vectors are built without an epsilon. So they have the class default, whatever
# `rms_norm_eps` is.
LATENT_NORM_EPS = 1e-6


def latent_shape(config: HFConfig, experts: Experts, query_rank: int) -> ModelShape:
    """Return the shape of a decoder with latent attention.

    Args:
        config: values of config.json.
        experts: its mixture of experts.
        query_rank: `q_lora_rank` if the key is absent. null means that queries come from the residual stream.
    """
    config.demand("attention_bias", (False,))
    config.demand("rope_interleave", (True,))  # megatron-core always pairs neighboring dimensions
    latent = Latent(
        query_rank=_query_rank(config, query_rank),
        key_value_rank=config.integer("kv_lora_rank"),
        plain_dim=config.integer("qk_nope_head_dim"),
        rotary_dim=config.integer("qk_rope_head_dim"),
        value_dim=config.integer("v_head_dim"),
        norm_eps=LATENT_NORM_EPS,
    )
    if latent.rotary_dim % 2:
        raise ConfigError(f"{config.where}: 'qk_rope_head_dim' is {latent.rotary_dim}, an even number is needed")
    return common_shape(
        config,
        latent.plain_dim + latent.rotary_dim,
        num_kv_heads=config.integer("num_attention_heads"),  # every head has keys and values of its own
        rope=config.rope(latent.rotary_dim),
        experts=experts,
        latent=latent,
        mtp_layers=mtp_layers(config),
    )


def _query_rank(config: HFConfig, default: int) -> int | None:
    if config.get("q_lora_rank") is not None:
        return config.integer("q_lora_rank")
    return None if "q_lora_rank" in config.values else default


def latent_rules(s: ModelShape) -> tuple[Rule, ...]:
    """Return the name table of a decoder with latent attention and experts."""
    assert s.experts is not None
    dense = feed_forward(s, layers="dense") if s.experts.dense_layers else ()
    return table(s, *latent_attention(s), *dense, *mixture(s))


def latent_attention(s: ModelShape) -> tuple[Rule, ...]:
    """Return the rules of latent attention and the norm before it.

    Every tensor-parallel rank holds the whole projections to narrow vectors.
    """
    assert s.latent is not None
    part, hf, hidden = s.latent, HF + "self_attn.", s.hidden_size
    narrow = part.key_value_rank + part.rotary_dim
    both = part.plain_dim + part.value_dim
    queries: tuple[Rule, ...]
    if part.query_rank is None:
        queries = (_rule("linear_q_proj", "q_proj", HeadRows(s.num_heads, s.head_dim, (hidden,))),)
    else:
        queries = (
            _rule("linear_q_down_proj", "q_a_proj", Replicated((part.query_rank, hidden))),
            _rule("q_layernorm", "q_a_layernorm", Replicated((part.query_rank,))),
            _rule("linear_q_up_proj", "q_b_proj", HeadRows(s.num_heads, s.head_dim, (part.query_rank,))),
        )
    return (
        Rule(MCORE + "input_layernorm.weight", (HF + "input_layernorm.weight",), Replicated((hidden,))),
        *queries,
        _rule("linear_kv_down_proj", "kv_a_proj_with_mqa", Replicated((narrow, hidden))),
        _rule("kv_layernorm", "kv_a_layernorm", Replicated((part.key_value_rank,))),
        _rule("linear_kv_up_proj", "kv_b_proj", HeadRows(s.num_heads, both, (part.key_value_rank,))),
        Rule(
            ATTENTION + "linear_proj.weight",
            (hf + "o_proj.weight",),
            RowParallel((hidden, s.num_heads * part.value_dim), "num_attention_heads * v_head_dim"),
        ),
    )


def _rule(mcore: str, name: str, layout: HeadRows | Replicated) -> Rule:
    return Rule(f"{ATTENTION}{mcore}.weight", (f"{HF}self_attn.{name}.weight",), layout)
