"""Log-probabilities and entropy of next tokens, computed from the last hidden states in chunks of rows.

The output projection is part of the function. The largest buffer is [chunk, vocab / tensor_parallel] in fp32. Backward
computes the logits again, except those of the first chunks, which are kept as far as a budget allows. So memory does
not grow with the number of tokens beyond that budget.

A float32 projection of 16-bit weights casts one block of the vocabulary at a time, at most as large as that buffer.
Every chunk of rows casts the weights again, which costs little next to the multiplication. On CUDA, the logits of such
a projection need no cast: tensor cores multiply the 16-bit operands and sum in float32.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_rl.alp.logits import LogitNoise

# Of fp32 logits. On CPU, near the cache size is fastest (measured). On CUDA, every chunk reads and writes the gradient
# of the output weights once, so few chunks should be faster (not measured).
CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 30}
# Of fp32 log-probabilities that one micro-batch keeps for backward.
KEPT_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}


def token_scores(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_R: torch.Tensor,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup,
    chunk_bytes: int | None = None,
    kept_bytes: int = 0,
    topk_labels_RK: torch.Tensor | None = None,
    fp32_product: bool = False,
    noise: LogitNoise | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return the log-probabilities of the labels and the entropies of softmax(hidden @ weight.T / temperature).

    The gradients are d logp_y / dx_j = 1[j = y] - p_j and dH / dx_j = -p_j (log p_j + H).

    Args:
        hidden_RH: rows whose next token is scored, equal on all ranks of `group`. Its gradient is this rank's share.
            The caller's gather or copy must sum it over `group`.
        weight_VH: this rank's slice of the output projection. Rows that pad the vocabulary beyond vocab_size are
            ignored.
        labels_R: global token ids.
        temperature: the logits are divided by it.
        vocab_size: size of the vocabulary without padding.
        group: tensor-parallel group whose ranks hold the slices of the vocabulary.
        chunk_bytes: bytes of one chunk of fp32 logits; None: CHUNK_BYTES of the device.
        kept_bytes: most bytes that are kept for backward, so that it need not compute these chunks again.
        topk_labels_RK: global ids of further tokens to score.
        fp32_product: compute the logits, and in backward the gradients of both operands, with float32 products of the
            operands as they are, instead of products rounded to the operands' dtype. Both gradients are rounded to that
            dtype once, when they are complete.
        noise: noise of these R rows, added to the logits before they are divided by the temperature. The distribution
            is softmax((hidden @ weight.T + sigma eps) / temperature). The gradient of its log_sigma is complete on
            every rank.

    Returns:
        log p(label) [R] fp32 and entropy [R] fp32. With topk_labels_RK also log p of those tokens, [R, K] fp32. Its
        gradient costs no further product: K more entries of each row of the logits' gradient.
    """
    shard = weight_VH.shape[0]
    start = group.rank() * shard
    real = min(shard, vocab_size - start)
    chunk = chunk_bytes or CHUNK_BYTES[hidden_RH.device.type]
    rows = max(1, chunk // (4 * shard))
    topk = None if topk_labels_RK is None else topk_labels_RK - start
    upcast = fp32_product and weight_VH.dtype != torch.float32
    head = _Float32Head(max(1, chunk // (4 * weight_VH.shape[1]))) if upcast else _Head()
    log_sigma = None if noise is None else noise.log_sigma
    kept = kept_bytes // (4 * real) if torch.is_grad_enabled() else 0
    settings = _Settings(temperature, start, real, group, rows, kept, head, noise)
    return _TokenScores.apply(hidden_RH, weight_VH, log_sigma, labels_R - start, topk, settings)


@dataclass(frozen=True)
class _Settings:
    """Settings of one call of `token_scores`.

    Attributes:
        temperature: the logits are divided by it.
        start: first token of this rank's slice of the vocabulary.
        real: number of tokens in this rank's slice, without padding.
        group: tensor-parallel group.
        rows: rows of hidden states per chunk.
        kept: rows whose log-probabilities may be kept for backward, in whole chunks.
        head: computes the products with the output weights.
        noise: noise on the logits; None: no noise.
    """

    temperature: float
    start: int
    real: int
    group: dist.ProcessGroup
    rows: int
    kept: int
    head: "_Head"
    noise: LogitNoise | None

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor, part: slice) -> torch.Tensor:
        """Return the logits of the rows `part` with noise, divided by the temperature: [rows, real] fp32."""
        logits = self.head.logits(hidden[part], weight[: self.real], self.temperature)
        if self.noise is not None:
            self.noise.add_(logits, part, self.start, self.temperature)
        return logits


class _Head:
    """Products with the output weights [V, H], in the weights' dtype."""

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return the logits of hidden [rows, H], divided by the temperature: [rows, V] fp32."""
        logits = self._product(hidden, weight)
        return logits if temperature == 1.0 else logits.div_(temperature)

    def backward(
        self,
        d_logits: torch.Tensor,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        d_hidden: torch.Tensor,
        d_weight: torch.Tensor,
    ) -> None:
        """Set d_hidden [rows, H] and add to d_weight [V, H] fp32, from d_logits [rows, V] fp32."""
        d_logits = d_logits.to(weight.dtype)
        torch.mm(d_logits, weight, out=d_hidden)
        if weight.dtype == torch.float32:
            d_weight.addmm_(d_logits.t(), hidden)
        elif hidden.is_cuda:  # the sum stays in the product, and no product is rounded before it is added
            torch.addmm(d_weight, d_logits.t(), hidden, out_dtype=torch.float32, out=d_weight)
        else:
            d_weight.add_(d_logits.t() @ hidden)

    def _product(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, weight).float()


class _Float32Head(_Head):
    """The same products of the same operands in float32, computed for `block` rows of the weights at a time."""

    def __init__(self, block: int) -> None:
        self.block = block

    def backward(
        self,
        d_logits: torch.Tensor,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        d_hidden: torch.Tensor,
        d_weight: torch.Tensor,
    ) -> None:
        hidden, total = hidden.float(), torch.zeros_like(hidden, dtype=torch.float32)
        for at in range(0, len(weight), self.block):
            part = slice(at, at + self.block)
            total.addmm_(d_logits[:, part], weight[part].float())
            d_weight[part].addmm_(d_logits[:, part].t(), hidden)
        d_hidden.copy_(total)

    def _product(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if hidden.is_cuda:  # 16-bit factors have exact products in float32, so tensor cores only sum in another order
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        hidden, logits = hidden.float(), hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
        for at in range(0, len(weight), self.block):
            part = slice(at, at + self.block)
            torch.mm(hidden, weight[part].float().t(), out=logits[:, part])
        return logits


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        log_sigma: torch.Tensor | None,
        local_labels: torch.Tensor,
        local_topk: torch.Tensor | None,
        settings: _Settings,
    ) -> tuple[torch.Tensor, ...]:
        real, group, rows = settings.real, settings.group, settings.rows
        # Column 0 is the label, the others are further tokens to score.
        local = local_labels[:, None] if local_topk is None else torch.cat([local_labels[:, None], local_topk], dim=1)
        owned = (local >= 0) & (local < real)
        column = local.clamp(0, real - 1)
        total = hidden.shape[0]
        topk = None if local_topk is None else hidden.new_empty(local_topk.shape, dtype=torch.float32)
        logp, entropy, log_z, peak = (hidden.new_empty(total, dtype=torch.float32) for _ in range(4))
        kept: list[torch.Tensor] = []
        for at in range(0, total, rows):
            part = slice(at, at + rows)
            x = settings.logits(hidden, weight, part)
            peak[part] = x.amax(-1)
            dist.all_reduce(peak[part], op=dist.ReduceOp.MAX, group=group)
            x.sub_(peak[part, None])
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
            if at + len(x) <= settings.kept:
                kept.append(x.sub_(log_z[part, None]))
        ctx.save_for_backward(hidden, weight, column, owned, peak, log_z, entropy, log_sigma, *kept)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return (logp, entropy) if topk is None else (logp, entropy, topk)

    @staticmethod
    def backward(
        ctx: Any,
        grad_logp: torch.Tensor | None,
        grad_entropy: torch.Tensor | None,
        grad_topk: torch.Tensor | None = None,
    ) -> tuple[Any, ...]:
        hidden, weight, column, owned, peak, log_z, entropy, _, *kept = ctx.saved_tensors
        settings: _Settings = ctx.settings
        real, rows, noise = settings.real, settings.rows, settings.noise if ctx.needs_input_grad[2] else None
        if grad_logp is None:
            grad_logp = torch.zeros_like(log_z)
        # With g the gradients of log p at the tokens `column`, d/dx_j = sum of g at j - p_j x sum of all g.
        if grad_topk is None:
            column, owned, grads = column[:, :1].contiguous(), owned[:, :1], grad_logp[:, None]
        else:
            grads = torch.cat([grad_logp[:, None], grad_topk], dim=1)
        total_grad, grads = grads.sum(1), grads * owned
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        d_log_sigma = None if noise is None else torch.zeros(1, dtype=torch.float64, device=weight.device)
        for at in range(0, hidden.shape[0], rows):
            part = slice(at, at + rows)
            number = at // rows
            if number >= len(kept):
                # In two steps, as in forward: every bit is that of a kept chunk.
                log_p = settings.logits(hidden, weight, part).sub_(peak[part, None]).sub_(log_z[part, None])
            else:  # a later backward may need it, too
                log_p = kept[number] if grad_entropy is None else kept[number].clone()
            p = log_p.exp()
            if grad_entropy is None:
                d_x = p.mul_(-total_grad[part, None])
            else:
                log_p.add_(entropy[part, None]).mul_(grad_entropy[part, None]).add_(total_grad[part, None])
                d_x = p.mul_(log_p.neg_())
            d_x.scatter_add_(-1, column[part], grads[part])
            if settings.temperature != 1.0:
                d_x.div_(settings.temperature)
            if noise is not None and d_log_sigma is not None:
                d_log_sigma += noise.dot(d_x, part, settings.start)
            settings.head.backward(d_x, hidden[part], weight[:real], d_hidden[part], d_weight[:real])
        if d_log_sigma is not None:  # so far the sum covers only this rank's slice of the vocabulary
            dist.all_reduce(d_log_sigma, group=settings.group)
            d_log_sigma = d_log_sigma.float()
        return d_hidden, d_weight.to(weight.dtype), d_log_sigma, None, None, None
