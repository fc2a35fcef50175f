"""Compares the logits of megatron-core's model and of transformers' on random tokens."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rl.config import make_config
from megatron_rl.errors import UserError
from megatron_rl.policy import parallel
from megatron_rl.policy.attention import PackedStream, plan_attention
from megatron_rl.policy.device_port import pick_device
from megatron_rl.policy.model import PolicyModel, build_chunks
from megatron_rl.precision.plan import resolve
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.hf_model import check_folder
from megatron_rl.weights.load_weights import load_weights

_CLOSE = 1e-3  # largest difference of float32 logits that rounding explains, relative to the largest logit


@dataclass(frozen=True)
class LogitsComparison:
    """How the logits of two models of the same weights differ.

    Attributes:
        tokens: number of tokens.
        difference: largest difference.
        largest: largest logit, as an absolute value.
        agreement: share of positions at which the most probable token is the same.
        kl: mean Kullback-Leibler divergence, in nats.
    """

    tokens: int
    difference: float
    largest: float
    agreement: float
    kl: float

    @property
    def equal(self) -> bool:
        """Whether rounding explains the difference."""
        return self.difference <= _CLOSE * max(1.0, self.largest)

    def line(self) -> str:
        """Return the comparison as text."""
        return (
            f"logits of {self.tokens} tokens: largest difference {self.difference:.2g} (largest logit "
            f"{self.largest:.3g}), same first choice {self.agreement:.1%}, KL {self.kl:.2g} nats"
        )


@torch.no_grad()
def compare_logits(folder: Path, tokens: int) -> LogitsComparison:
    """Compare the logits of a Hugging Face folder in megatron-core and in transformers, in float32, on one process.

    Args:
        folder: the model.
        tokens: number of random tokens.
    """
    source = check_folder(HFFolder(folder))
    if tokens > source.shape.max_position_embeddings:
        raise UserError(f"--logits {tokens} exceeds the model's {source.shape.max_position_embeddings} positions")
    config = make_config({"model": {"path": str(folder)}, "precision": {"train": "fp32"}})
    mesh = parallel.initialize(config.parallel, pick_device("auto"), seed=0)
    plan = resolve(config.precision, source.shape.num_layers, engine="embedded", device=mesh.device.type)
    (model,) = build_chunks(config, source.shape, mesh, plan, None)
    load_weights([model], source, tp_rank=0, tp_size=1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, source.shape.vocab_size, (tokens,), generator=generator).to(mesh.device)
    ours = packed_logits(model, ids).double()
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    theirs = reference.to(mesh.device)(ids[None]).logits[0].double()
    logp, other = ours.log_softmax(-1), theirs.log_softmax(-1)
    return LogitsComparison(
        tokens,
        float((ours - theirs).abs().max()),
        float(theirs.abs().max()),
        float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
        float((other.exp() * (other - logp)).sum(-1).mean()),
    )


@torch.no_grad()
def packed_logits(model: PolicyModel, tokens: Tensor) -> Tensor:
    """Return the logits of one sequence, shape [T, V], on one rank.

    Args:
        model: the whole model.
        tokens: token ids, shape [T].
    """
    length = len(tokens)
    bounds = torch.tensor([0, length], dtype=torch.int32, device=tokens.device)
    stream = PackedStream(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=bounds,
        cu_seqlens_kv_padded=bounds,
        max_seqlen_q=length,
        max_seqlen_kv=length,
        make_plan=partial(plan_attention, [0, length], 1, 0),
    )
    inner, rotary, cos, sin, offset, _, *_ = model._preprocess(
        input_ids=tokens[None], position_ids=torch.arange(length, device=tokens.device)[None], packed_seq_params=stream
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
