"""Log-probabilities and entropy of next tokens from the last hidden states, without ever holding all logits.

The output projection is part of the function: forward and backward walk over chunks of rows and recompute the
logits, so the largest buffer is [chunk, vocab / tensor_parallel] in fp32, whatever the number of tokens.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}  # of fp32 logits; on CPU near the cache is fastest (measured)


def token_scores(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_R: torch.Tensor,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup,
    chunk_bytes: int | None = None,
    topk_labels_RK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """log p(label) and entropy, both [R] fp32, of softmax(hidden @ weight.T / temperature).

    Third, with topk_labels_RK (global token ids): log p of those tokens, [R, K] fp32, without gradient.

    hidden_RH: rows whose next token is wanted, equal on all ranks of `group`; its gradient is this rank's
    share and must be summed over `group` by the caller's gather or copy. weight_VH: this rank's slice of the
    output projection; rows that pad the vocabulary beyond vocab_size take no part. labels_R: global token ids.
    d logp_y / dx_j = 1[j = y] - p_j and dH / dx_j = -p_j (log p_j + H).
    """
    shard = weight_VH.shape[0]
    start = group.rank() * shard
    real = min(shard, vocab_size - start)
    rows = max(1, (chunk_bytes or CHUNK_BYTES[hidden_RH.device.type]) // (4 * shard))
    topk = None if topk_labels_RK is None else topk_labels_RK - start
    return _TokenScores.apply(hidden_RH, weight_VH, labels_R - start, topk, temperature, real, group, rows)


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = F.linear(hidden, weight).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        local_labels: torch.Tensor,
        local_topk: torch.Tensor | None,
        temperature: float,
        real: int,
        group: dist.ProcessGroup,
        rows: int,
    ) -> tuple[torch.Tensor, ...]:
        # Column 0 is the label, the others are further tokens to score.
        local = local_labels[:, None] if local_topk is None else torch.cat([local_labels[:, None], local_topk], dim=1)
        owned = (local >= 0) & (local < real)
        column = local.clamp(0, real - 1)
        total = hidden.shape[0]
        topk = None if local_topk is None else hidden.new_empty(local_topk.shape, dtype=torch.float32)
        logp, entropy, log_z = (hidden.new_empty(total, dtype=torch.float32) for _ in range(3))
        for at in range(0, total, rows):
            part = slice(at, at + rows)
            x = _logits(hidden[part], weight[:real], temperature)
            peak = x.amax(-1)
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
            x.sub_(peak[:, None])
            wanted = x.gather(-1, column[part]).mul_(owned[part]).t()
            exp = x.exp()
            stats = torch.cat([exp.sum(-1)[None], torch.linalg.vecdot(exp, x)[None], wanted])
            dist.all_reduce(stats, group=group)
            z, weighted, wanted = stats[0], stats[1], stats[2:]
            log_z[part] = z.log()
            logp[part] = wanted[0] - log_z[part]
            if topk is not None:
                topk[part] = (wanted[1:] - log_z[part]).t()
            entropy[part] = log_z[part] - weighted / z
            log_z[part] += peak
        ctx.save_for_backward(hidden, weight, column[:, :1].contiguous(), owned[:, 0].contiguous(), log_z, entropy)
        ctx.settings = temperature, real, rows
        ctx.set_materialize_grads(False)
        if topk is None:
            return logp, entropy
        ctx.mark_non_differentiable(topk)
        return logp, entropy, topk

    @staticmethod
    def backward(ctx: Any, grad_logp: torch.Tensor | None, grad_entropy: torch.Tensor | None, *_: None) -> tuple[Any, ...]:
        hidden, weight, column, owned, log_z, entropy = ctx.saved_tensors
        temperature, real, rows = ctx.settings
        if grad_logp is None:
            grad_logp = torch.zeros_like(log_z)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for at in range(0, hidden.shape[0], rows):
            part = slice(at, at + rows)
            log_p = _logits(hidden[part], weight[:real], temperature).sub_(log_z[part, None])
            p = log_p.exp()
            if grad_entropy is None:
                d_x = p.mul_(-grad_logp[part, None])
            else:
                log_p.add_(entropy[part, None]).mul_(grad_entropy[part, None]).add_(grad_logp[part, None])
                d_x = p.mul_(log_p.neg_())
            d_x.scatter_add_(-1, column[part], (grad_logp[part] * owned[part])[:, None])
            if temperature != 1.0:
                d_x.div_(temperature)
            d_x = d_x.to(weight.dtype)
            torch.mm(d_x, weight[:real], out=d_hidden[part])
            if weight.dtype == torch.float32:
                d_weight[:real].addmm_(d_x.t(), hidden[part])
            else:
                d_weight[:real].add_(d_x.t() @ hidden[part])
        return d_hidden, d_weight.to(weight.dtype), *[None] * 6
