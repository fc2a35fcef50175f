"""The shape of a model: everything that its parameters and its forward pass depend on."""

from dataclasses import dataclass
from typing import Literal

from megatron_rl.weights.families.rope import RopePlan


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts that replaces the feed-forward network of a layer.

    Attributes:
        count: experts per layer.
        per_token: experts that compute each token.
        ffn_hidden_size: width of each expert.
        norm_topk_prob: the gates of a token's experts are normalized over these experts. Otherwise they come from the
            scores over all experts, and add up to less than 1.
        dense_layers: layers (from 0) that have a plain feed-forward network.
        score: how the router turns its logits into scores.
        correction_bias: the choice (not the gates) adds a bias per expert to the scores, a buffer kept in fp32.
        groups: experts are divided into so many groups, and a token goes to a few of them; 1: no groups.
        groups_per_token: groups that a token may go to.
        scaling: factor on the gates.
        shared_width: width of the feed-forward network that every token passes besides its experts; 0: none.
        biases: the router and the projections of the experts have biases.
    """

    count: int
    per_token: int
    ffn_hidden_size: int
    norm_topk_prob: bool
    dense_layers: frozenset[int] = frozenset()
    score: Literal["softmax", "sigmoid"] = "softmax"
    correction_bias: bool = False
    groups: int = 1
    groups_per_token: int = 1
    scaling: float = 1.0
    shared_width: int = 0
    biases: bool = False


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention: keys and values of all heads come from one narrow vector per token.

    Attributes:
        query_rank: width of the vector that queries come from; None: they come from the residual stream.
        key_value_rank: width of the vector that keys and values come from.
        plain_dim: dimensions of a query or key that positions do not turn.
        rotary_dim: dimensions of a query or key that positions turn; all heads share those of the key.
        value_dim: width of one head's values.
        norm_eps: epsilon of the norms of the narrow vectors.
    """

    query_rank: int | None
    key_value_rank: int
    plain_dim: int
    rotary_dim: int
    value_dim: int
    norm_eps: float


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes and kinds of a decoder.

    Attributes:
        num_layers: number of layers.
        hidden_size: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key-value heads.
        head_dim: width of one head.
        ffn_hidden_size: width of the feed-forward network of dense layers.
        vocab_size: rows of the embedding.
        norm_eps: epsilon of the RMS norms.
        rope: how positions turn queries and keys.
        tied_embeddings: the output layer is the embedding.
        max_position_embeddings: longest sequence the model is meant for, in tokens.
        qk_norm: queries and keys are normalized per head.
        qkv_bias: the projections to queries, keys and values have biases.
        out_bias: the projection of the attention's output has a bias.
        windows: number of keys that a query of each layer sees, itself included; None: all. Empty: all, in every layer.
        sinks: each head has a learned logit that takes part in the softmax and carries no value.
        activation: `silu`, or gpt-oss' clamped gated activation.
        output_norms: norms follow the attention and the feed-forward network, before their results are added.
        experts: the mixture of experts; None for a dense model.
        latent: sizes of latent attention; None for grouped-query attention. `head_dim` is then the width of queries.
        mtp_layers: layers for multi-token prediction that a folder may hold after the last layer. They are not trained.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    norm_eps: float
    rope: RopePlan
    tied_embeddings: bool
    max_position_embeddings: int
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    windows: tuple[int | None, ...] = ()
    sinks: bool = False
    activation: Literal["silu", "gpt_oss"] = "silu"
    output_norms: bool = False
    experts: Experts | None = None
    latent: Latent | None = None
    mtp_layers: int = 0

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer (from 0) has a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers
