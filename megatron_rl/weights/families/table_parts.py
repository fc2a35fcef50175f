"""Parts of name tables and shapes that most families have in common."""

from typing import Any, Literal

from megatron_rl.errors import ConfigError
from megatron_rl.weights.families.family import Rule
from megatron_rl.weights.families.hf_config import HFConfig
from megatron_rl.weights.families.shape import Experts, ModelShape
from megatron_rl.weights.layouts import QKV, GateUp, Layout, Replicated, RowParallel, VocabParallel

MCORE, HF = "decoder.layers.{layer}.", "model.layers.{layer}."
ATTENTION = MCORE + "self_attention."


def common_shape(config: HFConfig, head_dim: int, **parts: Any) -> ModelShape:
    """Return the shape of a decoder with grouped-query attention, from the keys that nearly all families have.

    Args:
        config: values of config.json.
        head_dim: width of one head.
        parts: the shape's other fields, among them `rope`, and `num_kv_heads` if no key of its own says it.
    """
    config.demand("hidden_act", ("silu",))
    heads, groups = "num_attention_heads", "num_key_value_heads"
    # The first models had as many key-value heads as query heads, and no key for it.
    own_groups = parts.pop("num_kv_heads", None) or config.integer(heads if config.get(groups) is None else groups)
    shape = ModelShape(
        num_layers=config.integer("num_hidden_layers"),
        hidden_size=config.integer("hidden_size"),
        num_heads=config.integer(heads),
        num_kv_heads=own_groups,
        head_dim=head_dim,
        ffn_hidden_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        norm_eps=config.number("rms_norm_eps"),
        tied_embeddings=config.boolean("tie_word_embeddings"),
        max_position_embeddings=config.integer("max_position_embeddings"),
        **parts,
    )
    if shape.num_heads % shape.num_kv_heads:
        raise ConfigError(
            f"{config.where}: 'num_key_value_heads' = {shape.num_kv_heads} does not divide "
            f"'num_attention_heads' = {shape.num_heads}"
        )
    return shape


def derived_head_dim(config: HFConfig) -> int:
    """Return `head_dim`, or the hidden size divided by the heads, as families without a default have it."""
    if config.get("head_dim") is not None:
        return config.integer("head_dim")
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if hidden % heads:
        raise ConfigError(f"{config.where}: 'num_attention_heads' = {heads} does not divide 'hidden_size' = {hidden}")
    return hidden // heads


def table(s: ModelShape, *layer: Rule) -> tuple[Rule, ...]:
    """Return a name table: embedding, the rules of each layer, final norm, output layer."""
    vocab = VocabParallel(s.vocab_size, s.hidden_size)
    embedding = "model.embed_tokens.weight"
    # A tied model on several pipeline stages keeps a copy of the embedding as the last stage's output layer.
    head = embedding if s.tied_embeddings else "lm_head.weight"
    return (
        Rule("embedding.word_embeddings.weight", (embedding,), vocab),
        *layer,
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated((s.hidden_size,))),
        Rule("output_layer.weight", (head,), vocab, exported=not s.tied_embeddings),
    )


def attention(s: ModelShape) -> tuple[Rule, ...]:
    """Return the rules of grouped-query attention and the norm before it."""
    hf = HF + "self_attn."
    hidden, head = Replicated((s.hidden_size,)), Replicated((s.head_dim,))
    projections: dict[str, tuple[int, ...]] = {"weight": (s.hidden_size,), **({"bias": ()} if s.qkv_bias else {})}
    norms = (Rule(f"{ATTENTION}{part}_layernorm.weight", (f"{hf}{part}_norm.weight",), head) for part in "qk")
    out = RowParallel((s.hidden_size, s.num_heads * s.head_dim), "num_attention_heads * head_dim")
    return (
        Rule(
            MCORE + "input_layernorm.weight",
            (HF + "input_layernorm.weight",),
            hidden,
            fused=ATTENTION + "linear_qkv.layer_norm_weight",
        ),
        *(
            Rule(
                f"{ATTENTION}linear_qkv.{ending}",
                tuple(f"{hf}{part}_proj.{ending}" for part in "qkv"),
                QKV(s.num_heads, s.num_kv_heads, s.head_dim, inner),
            )
            for ending, inner in projections.items()
        ),
        *(norms if s.qk_norm else ()),
        Rule(ATTENTION + "linear_proj.weight", (hf + "o_proj.weight",), out),
        *([Rule(ATTENTION + "linear_proj.bias", (hf + "o_proj.bias",), hidden)] if s.out_bias else []),
    )


def feed_forward(
    s: ModelShape, norm: str = "post_attention_layernorm", layers: Literal["all", "dense"] = "all"
) -> tuple[Rule, ...]:
    """Return the rules of a gated feed-forward network and the norm before it.

    Args:
        s: shape of the model.
        norm: Hugging Face name of the norm.
        layers: the layers that have it.
    """
    gate_up = GateUp(s.ffn_hidden_size, s.hidden_size)
    down = RowParallel((s.hidden_size, s.ffn_hidden_size), "intermediate_size")
    names = HF + "mlp.gate_proj.weight", HF + "mlp.up_proj.weight"
    return (
        Rule(
            MCORE + "pre_mlp_layernorm.weight",
            (f"{HF}{norm}.weight",),
            Replicated((s.hidden_size,)),
            fused=MCORE + "mlp.linear_fc1.layer_norm_weight",
            layers=layers,
        ),
        Rule(MCORE + "mlp.linear_fc1.weight", names, gate_up, layers=layers),
        Rule(MCORE + "mlp.linear_fc2.weight", (HF + "mlp.down_proj.weight",), down, layers=layers),
    )


def mixture(
    s: ModelShape,
    prefix: str = "mlp.",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    key: str = "moe_intermediate_size",
) -> tuple[Rule, ...]:
    """Return the rules of a router, its experts and its shared experts, and of the norm before them.

    Args:
        s: shape of the model.
        prefix: what Hugging Face calls the mixture.
        names: what it calls an expert's gate, up and down projections.
        key: config.json key of an expert's width.
    """
    assert s.experts is not None
    width, hf = s.experts.ffn_hidden_size, f"{HF}{prefix}"
    # Transformer Engine's grouped linears name the experts' matrices `weight0`, `weight1`...
    local, grouped = MCORE + "mlp.experts.local_experts.{expert}.", MCORE + "mlp.experts."
    gate, up, down = (f"{hf}experts.{{expert}}.{name}.weight" for name in names)
    router: Layout = Replicated((s.experts.count, s.hidden_size))
    return (
        Rule(
            MCORE + "pre_mlp_layernorm.weight",
            (HF + "post_attention_layernorm.weight",),
            Replicated((s.hidden_size,)),
            layers="experts",
        ),
        Rule(
            MCORE + "mlp.router.weight",
            (hf + "gate.weight",),
            router,
            layers="experts",
            other=(HF + "mlp.gate.weight",),
        ),
        *(_correction(s.experts.count, hf) if s.experts.correction_bias else ()),
        Rule(
            local + "linear_fc1.weight",
            (gate, up),
            GateUp(width, s.hidden_size, key),
            fused=grouped + "linear_fc1.weight{expert}",
            layers="experts",
            other=(HF + "mlp.experts.gate_up_proj",) * 2,
        ),
        Rule(
            local + "linear_fc2.weight",
            (down,),
            RowParallel((s.hidden_size, width), key),
            fused=grouped + "linear_fc2.weight{expert}",
            layers="experts",
            other=(HF + "mlp.experts.down_proj",),
        ),
        *(_shared(s, hf) if s.experts.shared_width else ()),
    )


def _correction(experts: int, hf: str) -> tuple[Rule, ...]:
    names = MCORE + "mlp.router.expert_bias", (hf + "gate.e_score_correction_bias",)
    return (Rule(*names, Replicated((experts,)), layers="experts", buffer=True),)


def _shared(s: ModelShape, hf: str) -> tuple[Rule, ...]:
    """Return the rules of the network that every token passes. Tensor parallelism cuts it, unlike the experts."""
    assert s.experts is not None
    width, key = s.experts.shared_width, "moe_intermediate_size * n_shared_experts"
    gate, up, down = (f"{hf}shared_experts.{part}_proj.weight" for part in ("gate", "up", "down"))
    here = MCORE + "mlp.shared_experts."
    down_layout = RowParallel((s.hidden_size, width), key)
    return (
        Rule(here + "linear_fc1.weight", (gate, up), GateUp(width, s.hidden_size, key), layers="experts"),
        Rule(here + "linear_fc2.weight", (down,), down_layout, layers="experts"),
    )


def check_choice(experts: Experts, where: str) -> Experts:
    """Return the experts if a router can learn to choose among them.

    Raises:
        ConfigError: if more experts are chosen than exist, or if the gate of the only chosen expert is always 1.
    """
    if experts.per_token > experts.count:
        raise ConfigError(
            f"{where}: 'num_experts_per_tok' = {experts.per_token} exceeds the number of experts, {experts.count}"
        )
    if experts.per_token == 1 and experts.norm_topk_prob:
        raise ConfigError(
            f"{where}: 'num_experts_per_tok' = 1 with 'norm_topk_prob' true makes every gate the constant 1: "
            "the router would never learn, which is not supported"
        )
    return experts
