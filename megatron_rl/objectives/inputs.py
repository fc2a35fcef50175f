"""The inputs of an objective: tensors of one micro-batch, and the counts that divide its sums."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from megatron_rl.errors import ConfigError, UserError, did_you_mean
from megatron_rl.objectives.packed_rows import PackedRows, packed_sort

LOG_RATIO_LIMIT = 20.0  # exp(20) is far outside any trust region, and its square still fits float32

NormMode = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]
Level = Literal["token", "sequence", "geometric", "cumulative"]

OPTIONAL = ("logmu", "logold", "logref", "rewards", "entropy", "topk", "staleness")

_PER_TOKEN = ("logp", "logmu", "logold", "logref", "entropy")


@dataclass(frozen=True)
class LossNorm:
    """How per-token losses l become one number, and the global counts that divide the sum.

        token_mean                sum(l) / tokens
        seq_mean_token_mean       sum over sequences of their token mean / sequences
        seq_mean_token_sum        sum(l) / sequences
        seq_mean_token_sum_norm   sum(l) / sequences / horizon

    Both counts are those of the whole optimizer batch. The losses of its micro-batches, on any number of ranks, then
    add up to the loss of the batch. A count is an int or a 0-d tensor; a missing count is taken from the mask.

    Attributes:
        mode: one of the four names above.
        tokens: number of trained tokens.
        sequences: number of sequences with at least one trained token.
        horizon: fixed response length; if missing, T of the right-padded tensors.
    """

    mode: NormMode
    tokens: int | Tensor | None = None
    sequences: int | Tensor | None = None
    horizon: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(NormMode):
            raise ConfigError(f"norm mode {self.mode!r} is unknown; {did_you_mean(self.mode, get_args(NormMode))}")
        for name in ("tokens", "sequences", "horizon"):
            value = getattr(self, name)
            if value is None or isinstance(value, Tensor):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ConfigError(f"norm {name} is {value!r}; it must be a positive number")

    @property
    def count(self) -> int | Tensor | None:
        """The global count that this mode divides by; None if it is to be taken from the mask."""
        return self.tokens if self.mode == "token_mean" else self.sequences


@dataclass(frozen=True)
class LossInputs:
    """Tensors of one micro-batch: [B, T] right-padded, or packed [1, T] with `seq_ids`.

    Attributes:
        logp: [B, T] float32 (float64 stays float64), differentiable; the current policy on the sampled tokens.
        logmu: [B, T], the behavior policy as the engine reported it; None if the objective does not need it.
        advantages: [B] or [B, T]; always [1, T] if packed.
        mask: [B, T], 1 on trained response tokens. Where it is 0, the values of the other tensors (inf and nan
            included) have no influence.
        logold: [B, T], the trainer's policy before the update; None if the objective does not need it.
        logref: [B, T], the reference policy; None if the objective does not need it.
        rewards: [B] or [B, T].
        seq_ids: [1, T] integer, the sequence that a packed token belongs to; any ids, -1 on padding.
        entropy: [B, T], differentiable.
        topk: logp and logmu of the engine's top-K tokens, [B, T, K] each; logp is differentiable if the objective has
            `score_centering`.
        staleness: [B, T], weight versions between the one that sampled the token and the one the step trains from.
        norm: overrides the objective's own norm; carries the global counts.
        columns: further per-token columns that the objective needs, by name, [B, T] each.
    """

    logp: Tensor
    logmu: Tensor | None = None
    # The checks refuse missing tensors before `per_token` runs. Advantages may be missing if the method does not use
    # them.
    advantages: Tensor = None  # type: ignore[assignment]
    mask: Tensor = None  # type: ignore[assignment]
    logold: Tensor | None = None
    logref: Tensor | None = None
    rewards: Tensor | None = None
    seq_ids: Tensor | None = None
    entropy: Tensor | None = None
    topk: tuple[Tensor, Tensor] | None = None
    staleness: Tensor | None = None
    norm: LossNorm | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, columns: Mapping[str, Tensor], **more: Any) -> Self:
        """Return inputs made of the columns of a micro-batch. `more` are the fields that are no columns."""
        own = {f.name for f in fields(cls)}
        fitting: dict[str, Any] = {name: tensor for name, tensor in columns.items() if name in own}
        further = {name: tensor for name, tensor in columns.items() if name not in own}
        return cls(**fitting, **more, columns=further)

    def get(self, name: str) -> Any:
        """Return a tensor of these inputs or a further column by its name; None if it is not there."""
        return self.columns[name] if name in self.columns else getattr(self, name, None)

    def log_ratio(self, denominator: str = "logmu", level: Level = "token", numerator: str = "logp") -> Tensor:
        """Return log(numerator / denominator), [B, T], clamped to +-20 and differentiable in logp.

        Every ratio is computed through this method. With x_t the log-ratio of token t, the levels are:

            token        x_t
            sequence     sum of x over the sequence
            geometric    mean of x over the sequence (GSPO, arXiv 2507.18071)
            cumulative   sum of x up to and including t

        Beyond the token level the pooled value is a constant, and d log_ratio_t / d logp_t = 1. The gradient of token t
        is then ratio x A x grad logp_t (arXiv 2603.19470).

        Args:
            denominator: name of the tensor below the fraction bar.
            level: what one ratio spans.
            numerator: name of the tensor above the fraction bar.

        Raises:
            UserError: one of the two tensors is missing.
        """
        above, below = getattr(self, numerator), getattr(self, denominator)
        for name, tensor in ((numerator, above), (denominator, below)):
            if tensor is None:
                raise UserError(f"{name} is missing: the importance ratio needs it")
        x: Tensor = above - below
        if level != "token":
            x = self._pooled(x.detach(), level) + (above - above.detach())
        return x.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

    def ratio(self, denominator: str = "logmu", level: Level = "token", numerator: str = "logp") -> Tensor:
        """Return exp(log_ratio), [B, T], differentiable in logp; the arguments are those of `log_ratio`."""
        return self.log_ratio(denominator, level, numerator).exp()

    def sequence_sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` [B, T] over each sequence, broadcastable over its tokens: [B, 1], packed [1, T].

        `values` must be 0 where mask is 0; the tensors of cleaned inputs are.
        """
        if self.seq_ids is None:
            return values.sum(1, keepdim=True)
        return self._rows.spread(self._rows.sums(values[0]))[None]

    def sequence_mean(self, values: Tensor) -> Tensor:
        """Return `sequence_sum` divided by the number of trained tokens of the sequence (at least 1)."""
        return self.sequence_sum(values) / self._lengths

    def running_sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` [B, T] over each sequence up to and including each token, [B, T]."""
        if self.seq_ids is None:
            return values.double().cumsum(1).to(values.dtype)
        return self._rows.running_sums(values[0])[None]

    def sequence_quantile(self, values: Tensor, q: float) -> Tensor:
        """Return the `q`-quantile over the trained tokens of each sequence, with linear interpolation.

        The result broadcasts over the tokens of the sequence: [B, 1], packed [1, T]. It is 0 without trained tokens.
        """
        trained = torch.where(self.mask > 0, values, torch.inf)
        place = q * (self._lengths - 1)
        below, above = place.floor(), place.ceil()
        if self.seq_ids is None:
            ascending = trained.sort(1).values
            low, high = ascending.gather(1, below.long()), ascending.gather(1, above.long())
        else:
            ascending, first = packed_sort(trained[0], self._rows.of_token)
            low, high = ascending[first + below[0].long()][None], ascending[first + above[0].long()][None]
        found = low + (high - low) * (place - below)
        return torch.where(low.isfinite(), found, 0.0)

    def _pooled(self, x: Tensor, level: Level) -> Tensor:
        if level == "sequence":
            return self.sequence_sum(x)
        if level == "geometric":
            return self.sequence_mean(x)
        return self.running_sum(x)

    def check_shapes(self) -> None:
        """Check shapes and dtypes. This reads no values, so it does not wait for a GPU.

        Raises:
            UserError: a shape or dtype is wrong; the message names the tensor.
        """
        if self.mask is None:
            raise UserError("mask is missing: it must be 1 on trained response tokens and 0 elsewhere")
        if self.logp.ndim != 2:
            raise UserError(f"logp has shape {list(self.logp.shape)}; it must be [B, T]")
        shape = self.logp.shape
        for name in (*_PER_TOKEN, "staleness", "mask", "seq_ids", *self.columns):
            tensor = self.get(name)
            if tensor is not None and tensor.shape != shape:
                raise UserError(f"{name} has shape {list(tensor.shape)}, logp has {list(shape)}: they must agree")
        for name in _PER_TOKEN:
            tensor = getattr(self, name)
            if tensor is not None and tensor.dtype not in (torch.float32, torch.float64):
                raise UserError(f"{name} is {tensor.dtype}; log-probabilities must be computed and kept in float32")
        self._check_topk()
        self._check_packing()
        for name in ("advantages", "rewards"):
            tensor = getattr(self, name)
            if tensor is None or tensor.shape == shape:
                continue
            if self.seq_ids is not None:
                raise UserError(
                    f"{name} has shape {list(tensor.shape)}; packed inputs need one value a token, {list(shape)}"
                )
            if tensor.shape != shape[:1]:
                raise UserError(f"{name} has shape {list(tensor.shape)}; it must be [{shape[0]}] or {list(shape)}")

    def _check_topk(self) -> None:
        if self.topk is None:
            return
        if not isinstance(self.topk, (tuple, list)) or len(self.topk) != 2:
            raise UserError("topk must be two tensors: logp and logmu of the engine's top-K tokens")
        first, batch, length = self.topk[0], *self.logp.shape
        for tensor in self.topk:
            if tensor.ndim != 3 or tensor.shape[:2] != (batch, length) or tensor.shape != first.shape:
                raise UserError(
                    f"topk holds a tensor of shape {list(tensor.shape)}; both must be [{batch}, {length}, K]"
                )
            if tensor.dtype not in (torch.float32, torch.float64):
                raise UserError(f"topk holds {tensor.dtype}; log-probabilities must be computed and kept in float32")

    def _check_packing(self) -> None:
        if self.seq_ids is None:
            return
        if self.logp.shape[0] != 1:
            raise UserError(
                f"seq_ids is given, so tensors must be packed as [1, T], but logp is {list(self.logp.shape)}"
            )
        if self.seq_ids.is_floating_point() or self.seq_ids.dtype == torch.bool:
            raise UserError(f"seq_ids is {self.seq_ids.dtype}; it must hold integers")
        if self.norm and self.norm.mode == "seq_mean_token_sum_norm" and self.norm.horizon is None:
            raise UserError(
                "norm seq_mean_token_sum_norm has no horizon; packed inputs need one, e.g. the longest response"
            )

    def validated(self) -> Self:
        """Return these inputs after a check of shapes and values: where mask is 1, every number must be finite.

        Reading values waits for the device, so objectives do it on CPU tensors only. The trainer checks the columns of
        a batch on the host (`Batch.check_finite`) before they are copied to a GPU.

        Raises:
            UserError: a check fails; the message names tensor, row and position.
        """
        self.check_shapes()
        mask = self.mask.to(self.logp.dtype)
        if bool(torch.count_nonzero(mask * (mask - 1))):
            raise UserError("mask holds values other than 0 and 1")
        if not bool(mask.sum()) and (self.norm is None or self.norm.count is None):
            raise UserError(
                "mask selects no token, so the loss has nothing to average; drop the batch, or give norm its count"
            )
        keep = self.mask.bool()
        if self.seq_ids is not None and bool(torch.count_nonzero(keep & (self.seq_ids < 0))):
            raise UserError("mask is 1 on padding: seq_ids is negative there")
        for name in (*_PER_TOKEN, "staleness", "advantages", "rewards", *self.columns):
            tensor = self.get(name)
            if tensor is not None:
                _check_finite(name, tensor, keep)
        for name, tensor in zip(("topk[0] (logp)", "topk[1] (logmu)"), self.topk or (), strict=False):
            if not _finite_sum(tensor):  # one sum over all is cheaper than a sum for each token
                _check_finite(name, tensor.sum(-1), keep)
        return self

    def cleaned(self) -> Self:
        """Return the same micro-batch in one dtype: advantages [B, T], constants detached, zeros where mask is 0.

        `mask` must contain only zeros and ones; `validated` checks this.
        """
        keep, mask = self.mask.bool(), self.mask.to(self.logp.dtype)

        def clean(tensor: Tensor) -> Tensor:
            tensor = tensor.to(self.logp.dtype)
            # On CPU a product is 3 to 15 times as fast as torch.where, but it does not remove inf and nan. A finite sum
            # shows that there are none.
            rows, trained = (keep[..., None], mask[..., None]) if tensor.ndim == 3 else (keep, mask)
            if tensor.device.type == "cpu" and _finite_sum(tensor):
                return _per_token(tensor, trained) * trained
            return torch.where(rows, _per_token(tensor, trained), 0.0)

        def constant(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else clean(tensor.detach())

        return replace(
            self,
            logp=clean(self.logp),
            logmu=constant(self.logmu),
            advantages=torch.zeros_like(mask) if self.advantages is None else clean(self.advantages.detach()),
            mask=mask,
            logold=constant(self.logold),
            logref=constant(self.logref),
            rewards=constant(self.rewards),
            entropy=None if self.entropy is None else clean(self.entropy),
            topk=None if self.topk is None else (clean(self.topk[0]), clean(self.topk[1].detach())),
            staleness=constant(self.staleness),
            columns={name: clean(tensor.detach()) for name, tensor in self.columns.items()},
        )

    def token_weights(self, norm: LossNorm) -> Tensor:
        """Return the factor of each token in the aggregated loss, [B, T]; 0 where mask is 0.

        This needs no device synchronization.
        """
        return self.mask / self._divisor(norm)

    def aggregate(self, values: Tensor, norm: LossNorm) -> Tensor:
        """Return the sum of values x token_weights, 0-d.

        `values` is [B, T] or broadcasts to it, and is 0 where mask is 0.
        """
        if norm.mode != "seq_mean_token_mean":
            return values.sum() / self._divisor(norm)
        return ((values.sum(1, keepdim=True) if self.seq_ids is None else values) / self._divisor(norm)).sum()

    def _divisor(self, norm: LossNorm) -> int | float | Tensor:
        """Return the divisor of a token's loss: a number, or [B, 1] (packed [1, T]) if it depends on the sequence."""
        if norm.mode == "token_mean":
            return self.token_count(norm)
        sequences = self.sequence_count() if norm.sequences is None else norm.sequences
        if norm.mode == "seq_mean_token_mean":
            return self._lengths * sequences
        if norm.mode == "seq_mean_token_sum":
            return sequences
        return sequences * (norm.horizon or self.mask.shape[1])

    def sequence_count(self) -> Tensor:
        """Return the number of sequences with at least one trained token, 0-d; at least 1."""
        trained = self.mask.sum(1) if self.seq_ids is None else self._trained_by_row
        return (trained > 0).sum().clamp(min=1)

    def token_count(self, norm: LossNorm) -> int | Tensor:
        """Return the number of trained tokens of the whole optimizer batch; at least 1 if the mask is counted here."""
        return self.mask.sum().clamp(min=1) if norm.tokens is None else norm.tokens

    @cached_property
    def _rows(self) -> PackedRows:
        """The sequences of packed inputs."""
        assert self.seq_ids is not None
        return PackedRows(self.seq_ids[0], by_runs=self.seq_ids.device.type == "cpu")

    @cached_property
    def _lengths(self) -> Tensor:
        """Trained tokens of each sequence, at least 1: [B, 1], packed [1, T]."""
        if self.seq_ids is None:
            return self.mask.sum(1, keepdim=True).clamp(min=1)
        return self._rows.spread(self._trained_by_row.clamp(min=1))[None]

    @cached_property
    def _trained_by_row(self) -> Tensor:
        """Trained tokens of each packed sequence, at its number."""
        return self._rows.sums(self.mask[0])


def _check_finite(name: str, tensor: Tensor, keep: Tensor) -> None:
    """Raise UserError naming the first non-finite value of a trained token; `tensor` is [B] or [B, T]."""
    if _finite_sum(tensor):
        return
    tensor = _per_token(tensor, keep)
    bad = (~torch.isfinite(tensor) & keep).nonzero()
    if len(bad):
        row, position = bad[0].tolist()
        raise UserError(
            f"{name}[{row}, {position}] is {tensor[row, position].item()} on a trained token ({len(bad)} such tokens)"
        )


def _finite_sum(tensor: Tensor) -> bool:
    """Return True if the sum is finite, and then every number is finite. This waits for the device.

    False does not prove the opposite: finite numbers can also overflow the sum.
    """
    return bool(torch.isfinite(tensor.detach().sum()))


def _per_token(tensor: Tensor, like: Tensor) -> Tensor:
    """Expand a tensor [B] or [B, T] to [B, T]."""
    return tensor[:, None].expand_as(like) if tensor.ndim == 1 else tensor
