"""The logits of a megatron-core model, for comparisons."""

import torch
from torch import Tensor

from megatron_rl.policy.attention import PackedStream, plan_attention
from megatron_rl.policy.model import PolicyModel


@torch.no_grad()
def packed_logits(model: PolicyModel, tokens: Tensor) -> Tensor:
    """Return the logits of one sequence, shape [T, V], on one rank.

    Args:
        model: the whole model.
        tokens: token ids, shape [T].
    """
    length = len(tokens)
    bounds = torch.tensor([0, length], dtype=torch.int32)
    stream = PackedStream(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=bounds,
        cu_seqlens_kv_padded=bounds,
        max_seqlen_q=length,
        max_seqlen_kv=length,
        plan=plan_attention([0, length], 1, 0, torch.device("cpu")),
    )
    inner, rotary, cos, sin, offset, _, *_ = model._preprocess(
        input_ids=tokens[None], position_ids=torch.arange(length)[None], packed_seq_params=stream
    )
    hidden = model.decoder(
        hidden_states=inner,
        attention_mask=None,
        rotary_pos_emb=rotary,
        rotary_pos_cos=cos,
        rotary_pos_sin=sin,
        packed_seq_params=stream,
        sequence_len_offset=offset,
    )
    tied = model.share_embeddings_and_output_weights
    weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    return hidden[:, 0] @ weight[: model.real_vocab_size].T
