"""Qwen3 (dense): grouped-query attention with normalized queries and keys, gated SiLU MLP, RMSNorm, plain RoPE."""

from megatron_rl.errors import ConfigError
from megatron_rl.weights.families.family import Family, HFConfig, ModelShape, Rule
from megatron_rl.weights.layouts import QKV, GateUp, Replicated, RowParallel, VocabParallel


def read_shape(config: HFConfig) -> ModelShape:
    """Return the part of the shape that Qwen3 models with and without experts have in common."""
    config.demand("hidden_act", ("silu",))
    config.demand("attention_bias", (False, None))
    config.no_sliding_window()
    shape = ModelShape(
        num_layers=config.integer("num_hidden_layers"),
        hidden_size=config.integer("hidden_size"),
        num_heads=config.integer("num_attention_heads"),
        num_kv_heads=config.integer("num_key_value_heads"),
        head_dim=config.integer("head_dim"),
        ffn_hidden_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        norm_eps=config.number("rms_norm_eps"),
        rope_theta=config.rope_theta(),
        qk_norm=True,
        qkv_bias=False,
        tied_embeddings=config.boolean("tie_word_embeddings"),
        max_position_embeddings=config.integer("max_position_embeddings"),
        dtype=config.dtype(),
    )
    if shape.num_heads % shape.num_kv_heads:
        raise ConfigError(
            f"{config.where}: 'num_key_value_heads' = {shape.num_kv_heads} does not divide "
            f"'num_attention_heads' = {shape.num_heads}"
        )
    return shape


MCORE, HF = "decoder.layers.{layer}.", "model.layers.{layer}."


def table(s: ModelShape, feed_forward: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Return the name table of a Qwen3 model.

    `feed_forward` holds the rules of what follows the attention of each layer, including its norm.
    """
    mcore, hf = MCORE, HF
    hidden, head = Replicated((s.hidden_size,)), Replicated((s.head_dim,))
    vocab = VocabParallel(s.vocab_size, s.hidden_size)
    qkv = QKV(s.num_heads, s.num_kv_heads, s.head_dim, (s.hidden_size,))
    attention_out = RowParallel((s.hidden_size, s.num_heads * s.head_dim), "num_attention_heads * head_dim")
    embedding = "model.embed_tokens.weight"
    # A tied model on several pipeline stages keeps a copy of the embedding as the last stage's output layer.
    output = (
        ("output_layer.weight", (embedding,), False)
        if s.tied_embeddings
        else ("output_layer.weight", ("lm_head.weight",), True)
    )
    return (
        Rule("embedding.word_embeddings.weight", (embedding,), vocab),
        Rule(
            mcore + "input_layernorm.weight",
            (hf + "input_layernorm.weight",),
            hidden,
            fused=mcore + "self_attention.linear_qkv.layer_norm_weight",
        ),
        Rule(
            mcore + "self_attention.linear_qkv.weight",
            tuple(f"{hf}self_attn.{part}_proj.weight" for part in "qkv"),
            qkv,
        ),
        Rule(mcore + "self_attention.q_layernorm.weight", (hf + "self_attn.q_norm.weight",), head),
        Rule(mcore + "self_attention.k_layernorm.weight", (hf + "self_attn.k_norm.weight",), head),
        Rule(mcore + "self_attention.linear_proj.weight", (hf + "self_attn.o_proj.weight",), attention_out),
        *feed_forward,
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), hidden),
        Rule(output[0], output[1], vocab, exported=output[2]),
    )


def _rules(s: ModelShape) -> tuple[Rule, ...]:
    gate_up = GateUp(s.ffn_hidden_size, s.hidden_size)
    down = RowParallel((s.hidden_size, s.ffn_hidden_size), "intermediate_size")
    norm = Rule(
        MCORE + "pre_mlp_layernorm.weight",
        (HF + "post_attention_layernorm.weight",),
        Replicated((s.hidden_size,)),
        fused=MCORE + "mlp.linear_fc1.layer_norm_weight",
    )
    return table(
        s,
        (
            norm,
            Rule(MCORE + "mlp.linear_fc1.weight", (HF + "mlp.gate_proj.weight", HF + "mlp.up_proj.weight"), gate_up),
            Rule(MCORE + "mlp.linear_fc2.weight", (HF + "mlp.down_proj.weight",), down),
        ),
    )


QWEN3 = Family(architectures=("Qwen3ForCausalLM",), shape_from_config=read_shape, rules=_rules)
