"""What an objective is given: tensors of one micro-batch, and the counts its sums are divided by."""

from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.objectives.options import suggest

LOG_RATIO_LIMIT = 20.0  # exp(20) is far outside any trust region, and its square still fits float32

NormMode = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]

_PER_TOKEN = ("logp", "logmu", "logold", "logref", "entropy")


@dataclass(frozen=True)
class LossNorm:
    """How per-token losses l become one number, and the global counts that divide the sum.

    token_mean                sum(l) / tokens
    seq_mean_token_mean       sum over sequences of their token mean / sequences
    seq_mean_token_sum        sum(l) / sequences
    seq_mean_token_sum_norm   sum(l) / sequences / horizon

    tokens: trained tokens; sequences: sequences with at least one of them; both of the whole optimizer batch, so
    that the losses of its micro-batches, on any number of ranks, add up to the loss of the batch. int or 0-d tensor.
    A missing count is taken from the mask. horizon: fixed response length; missing means T of right-padded tensors.
    """

    mode: NormMode
    tokens: int | Tensor | None = None
    sequences: int | Tensor | None = None
    horizon: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(NormMode):
            raise ConfigError(f"norm mode {self.mode!r} is unknown; {suggest(self.mode, get_args(NormMode))}")
        for name in ("tokens", "sequences", "horizon"):
            value = getattr(self, name)
            if value is None or isinstance(value, Tensor):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ConfigError(f"norm {name} is {value!r}; it must be a positive number")

    @property
    def count(self) -> int | Tensor | None:
        """The global count this mode divides by; None when it is to be taken from the mask."""
        return self.tokens if self.mode == "token_mean" else self.sequences


@dataclass(frozen=True)
class LossInputs:
    """Tensors of one micro-batch: [B, T] right-padded, or packed [1, T] with `seq_ids`.

    logp [B, T] float32 (float64 stays float64), differentiable: current policy on the sampled tokens.
    logmu, logold, logref [B, T]: behaviour policy as the engine reported it, trainer before the update, reference;
        None when the objective does not need them.
    advantages [B], or [B, T] (always [1, T] when packed). mask [B, T]: 1 on trained response tokens; whatever the other
        tensors hold where it is 0 (inf and nan included) has no influence.
    rewards [B] or [B, T]; entropy [B, T], differentiable; topk: logp and logmu of the engine's top-K tokens, [B, T, K] each.
    seq_ids [1, T] integer: which sequence a packed token belongs to; any ids, -1 on padding.
    norm: overrides the objective's own norm; carries the global counts.
    """

    logp: Tensor
    logmu: Tensor | None
    advantages: Tensor
    mask: Tensor
    logold: Tensor | None = None
    logref: Tensor | None = None
    rewards: Tensor | None = None
    seq_ids: Tensor | None = None
    entropy: Tensor | None = None
    topk: tuple[Tensor, Tensor] | None = None
    norm: LossNorm | None = None

    def log_ratio(self, denominator: str = "logmu") -> Tensor:
        """[B, T] logp - denominator, clamped to +-20; differentiable in logp. Every ratio goes through here."""
        below = getattr(self, denominator)
        if below is None:
            raise UserError(f"{denominator} is missing: the importance ratio needs it")
        return (self.logp - below).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

    def ratio(self, denominator: str = "logmu") -> Tensor:
        """[B, T] exp(log_ratio), differentiable in logp."""
        return self.log_ratio(denominator).exp()

    def check_shapes(self) -> None:
        """Raises UserError naming the tensor whose shape or dtype is wrong; reads no values, so it is free on a GPU."""
        if self.logp.ndim != 2:
            raise UserError(f"logp has shape {list(self.logp.shape)}; it must be [B, T]")
        shape = self.logp.shape
        for name in (*_PER_TOKEN, "mask", "seq_ids"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise UserError(f"{name} has shape {list(tensor.shape)}, logp has {list(shape)}: they must agree")
        for name in _PER_TOKEN:
            tensor = getattr(self, name)
            if tensor is not None and tensor.dtype not in (torch.float32, torch.float64):
                raise UserError(f"{name} is {tensor.dtype}; log-probabilities must be computed and kept in float32")
        self._check_packing()
        for name in ("advantages", "rewards"):
            tensor = getattr(self, name)
            if tensor is None or tensor.shape == shape:
                continue
            if self.seq_ids is not None:
                raise UserError(f"{name} has shape {list(tensor.shape)}; packed inputs need one value a token, {list(shape)}")
            if tensor.shape != shape[:1]:
                raise UserError(f"{name} has shape {list(tensor.shape)}; it must be [{shape[0]}] or {list(shape)}")

    def _check_packing(self) -> None:
        if self.seq_ids is None:
            return
        if self.logp.shape[0] != 1:
            raise UserError(f"seq_ids is given, so tensors must be packed as [1, T], but logp is {list(self.logp.shape)}")
        if self.seq_ids.is_floating_point() or self.seq_ids.dtype == torch.bool:
            raise UserError(f"seq_ids is {self.seq_ids.dtype}; it must hold integers")
        if self.norm and self.norm.mode == "seq_mean_token_sum_norm" and self.norm.horizon is None:
            raise UserError("norm seq_mean_token_sum_norm has no horizon; packed inputs need one, e.g. the longest response")

    def validated(self) -> Self:
        """These inputs, their shapes and values checked; raises UserError naming tensor, row and position.

        Looking at values waits for the device. Objectives therefore do it by themselves on CPU tensors only; code that
        feeds a GPU calls this where the batch is built. Checked where mask is 1: every number is finite.
        """
        self.check_shapes()
        keep = self.mask == 1
        if not bool((keep | (self.mask == 0)).all()):
            raise UserError("mask holds values other than 0 and 1")
        if not bool(keep.any()) and (self.norm is None or self.norm.count is None):
            raise UserError("mask selects no token, so the loss has nothing to average; drop the batch, or give norm its count")
        if self.seq_ids is not None and bool((keep & (self.seq_ids < 0)).any()):
            raise UserError("mask is 1 on padding: seq_ids is negative there")
        for name in (*_PER_TOKEN, "advantages", "rewards"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            bad = (~torch.isfinite(_per_token(tensor, keep)) & keep).nonzero()
            if len(bad):
                row, position = bad[0].tolist()
                value = _per_token(tensor, keep)[row, position].item()
                raise UserError(f"{name}[{row}, {position}] is {value} on a trained token ({len(bad)} such tokens)")
        return self

    def cleaned(self) -> Self:
        """The same micro-batch in one dtype: advantages [B, T], constants detached, exact zeros where mask is 0."""
        keep = self.mask.bool()

        def clean(tensor: Tensor) -> Tensor:
            return torch.where(keep, _per_token(tensor, keep).to(self.logp.dtype), 0.0)

        def constant(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else clean(tensor.detach())

        return replace(
            self,
            logp=clean(self.logp),
            logmu=constant(self.logmu),
            advantages=clean(self.advantages.detach()),
            mask=keep.to(self.logp.dtype),
            logold=constant(self.logold),
            logref=constant(self.logref),
            rewards=constant(self.rewards),
            entropy=None if self.entropy is None else clean(self.entropy),
        )

    def token_weights(self, norm: LossNorm) -> Tensor:
        """[B, T]: the factor of each token in the aggregated loss; 0 where mask is 0. Needs no device synchronisation."""
        if norm.mode == "token_mean":
            return self.mask / self.token_count(norm)
        rows, size = self._rows()
        lengths = self.mask.new_zeros(size).index_add(0, rows, self.mask.flatten())
        sequences = (lengths > 0).sum() if norm.sequences is None else norm.sequences
        if norm.mode == "seq_mean_token_mean":
            return self.mask / (lengths.clamp(min=1)[rows].view_as(self.mask) * sequences)
        if norm.mode == "seq_mean_token_sum":
            return self.mask / sequences
        return self.mask / (sequences * (norm.horizon or self.mask.shape[1]))

    def token_count(self, norm: LossNorm) -> int | Tensor:
        """Trained tokens of the whole optimizer batch."""
        return self.mask.sum() if norm.tokens is None else norm.tokens

    def _rows(self) -> tuple[Tensor, int]:
        """Sequence index of every token, flat [B * T], and an upper bound of their number."""
        batch, length = self.mask.shape
        if self.seq_ids is None:
            return torch.arange(batch, device=self.mask.device).repeat_interleave(length), batch
        # Not torch.unique: its output size depends on the data, which would wait for the device.
        ids, order = self.seq_ids.flatten().sort()
        ranks = torch.zeros_like(order)
        ranks[1:] = (ids[1:] != ids[:-1]).cumsum(0)
        return torch.zeros_like(order).scatter(0, order, ranks), length


def _per_token(tensor: Tensor, like: Tensor) -> Tensor:
    """[B] or [B, T] -> [B, T]."""
    return tensor[:, None].expand_as(like) if tensor.ndim == 1 else tensor
