"""Qwen3 (dense): grouped-query attention with normalised queries and keys, gated SiLU MLP, RMSNorm, plain RoPE."""

from megatron_rl.errors import ConfigError
from megatron_rl.weights.families.base import Family, HFConfig, ModelShape, Rule
from megatron_rl.weights.layouts import QKV, GateUp, Replicated, Row, VocabRows


def _shape(config: HFConfig) -> ModelShape:
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


def _rules(s: ModelShape) -> tuple[Rule, ...]:
    mcore, hf = "decoder.layers.{layer}.", "model.layers.{layer}."
    hidden, head = Replicated((s.hidden_size,)), Replicated((s.head_dim,))
    vocab = VocabRows(s.vocab_size, s.hidden_size)
    qkv = QKV(s.num_heads, s.num_kv_heads, s.head_dim, (s.hidden_size,))
    attention_out = Row((s.hidden_size, s.num_heads * s.head_dim), "num_attention_heads * head_dim")
    gate_up = GateUp(s.ffn_hidden_size, s.hidden_size)
    down = Row((s.hidden_size, s.ffn_hidden_size), "intermediate_size")
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
        Rule(
            mcore + "pre_mlp_layernorm.weight",
            (hf + "post_attention_layernorm.weight",),
            hidden,
            fused=mcore + "mlp.linear_fc1.layer_norm_weight",
        ),
        Rule(mcore + "mlp.linear_fc1.weight", (hf + "mlp.gate_proj.weight", hf + "mlp.up_proj.weight"), gate_up),
        Rule(mcore + "mlp.linear_fc2.weight", (hf + "mlp.down_proj.weight",), down),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), hidden),
        Rule(output[0], output[1], vocab, exported=output[2]),
    )


QWEN3 = Family(architectures=("Qwen3ForCausalLM",), shape_from_config=_shape, rules=_rules)
