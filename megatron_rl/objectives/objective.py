"""The frame of every objective: check the inputs, ask the method for per-token losses, aggregate.

An objective is a frozen dataclass in a file of its own. It declares its options as fields, the tensors it
`needs`, its paper's normalization, and implements `per_token`; nothing else.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.objectives.inputs import OPTIONAL, LossInputs, LossNorm, NormMode
from megatron_rl.objectives.options import checked, choice, nonnegative, positive, suggest

__all__ = ["LossInputs", "LossNorm", "LossOutputs", "Objective", "TokenLoss", "choice", "positive"]

_PER_SEQUENCE = LossNorm("seq_mean_token_mean")


@dataclass(frozen=True)
class TokenLoss:
    """What a method computes: loss [B, T] differentiable; weight [B, T], the w of -dloss/dlogp = A r w, or None
    where the method has no such form; metrics [B, T] each, averaged over trained tokens; sequence_metrics [B, T] each,
    averaged within each sequence and then over sequences."""

    loss: Tensor
    weight: Tensor | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    sequence_metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LossOutputs:
    """loss: 0-d, to call backward on. loss_tok, weight_tok [B, T]: the method's own, per token, before aggregation and
    without KL and entropy terms; 0 where mask is 0.

    metrics: detached 0-d tensors, sums over this micro-batch divided by the *global* counts (`norm.tokens`,
    `norm.sequences`), so that the values of all micro-batches add up to the mean of the batch.
    """

    loss: Tensor
    loss_tok: Tensor
    weight_tok: Tensor | None
    metrics: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """A pure function from LossInputs to LossOutputs. Raises ConfigError for an illegal option when it is built.

        loss = aggregate(loss_tok) + kl_coef x aggregate(kl to the reference) - entropy_coef x aggregate(entropy)

    The last two are computed, and their tensors needed, only when their coefficient is not 0.
    """

    norm: LossNorm | None = None  # None stands for the paper's; a LossNorm once built
    kl_coef: float = nonnegative(0.0, "weight of the KL divergence to the reference policy")
    kl: str = choice("k3", ("k1", "k2", "k3"), "its estimator, with x = logref - logp: -x, x^2 / 2, exp(x) - x - 1")
    entropy_coef: float = nonnegative(0.0, "weight of the entropy bonus")

    name: ClassVar[str] = ""
    default_norm: ClassVar[NormMode] = "token_mean"
    uses_advantages: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        """Names of the optional tensors of LossInputs that must be there; the others need not be computed.

        A method adds its own: `super().needs | {"logmu"}`.
        """
        return frozenset(name for name, coef in (("logref", self.kl_coef), ("entropy", self.entropy_coef)) if coef)

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", _as_norm(self.norm, self.default_norm))
        for option in fields(self):
            object.__setattr__(self, option.name, checked(self.name, option, getattr(self, option.name)))

    @abstractmethod
    def per_token(self, x: LossInputs) -> TokenLoss:
        """The method. Every tensor of x is [B, T] in one dtype, constants detached, zeros where mask is 0.

        What it returns there is dropped, but must be finite. On CPU `torch.where` and `masked_fill` cost 3 to 15 products.
        """

    def check_values(self, x: LossInputs) -> None:  # noqa: B027  most methods take any finite number
        """Raises UserError for values the method cannot take; called on CPU tensors only, x as in `per_token`."""

    def summary(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics made of the means of others over a whole update, such as a ratio of two of them."""
        return {}

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """Loss of one micro-batch. Raises UserError naming a tensor that is missing or malformed.

        Values (finite numbers, a mask with tokens in it) are checked on CPU tensors; on a GPU that would stall the
        stream, so the trainer checks the columns of a batch on the host.
        """
        norm = inputs.norm or _as_norm(self.norm, self.default_norm)
        unused = {tensor: None for tensor in OPTIONAL if tensor not in self.needs}
        inputs = replace(inputs, norm=norm, **unused)  # type: ignore[arg-type]
        for tensor in sorted(self.needs):
            if getattr(inputs, tensor) is None:
                raise UserError(f"objective {self.name} needs '{tensor}', which is missing from its inputs")
        if inputs.advantages is None and self.uses_advantages:
            raise UserError(f"objective {self.name} needs 'advantages', which is missing from its inputs")
        if inputs.logp.device.type == "cpu":
            x = inputs.validated().cleaned()
            self.check_values(x)
        else:
            inputs.check_shapes()
            x = inputs.cleaned()
        token = self.per_token(x)
        loss_tok = token.loss * x.mask
        terms, term_metrics = self._terms(x)
        return LossOutputs(
            loss=x.aggregate(loss_tok if terms is None else loss_tok + terms, norm),
            loss_tok=loss_tok,
            weight_tok=None if token.weight is None else token.weight.detach() * x.mask,
            metrics=_averaged(x, norm, {**token.metrics, **term_metrics}, token.sequence_metrics),
        )

    def _terms(self, x: LossInputs) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The KL and entropy terms per token, None when both are off, and their metrics."""
        terms: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        if self.kl_coef:
            divergence = _kl(-x.log_ratio("logref"), self.kl)
            terms.append(self.kl_coef * divergence)
            metrics["kl_ref"] = divergence
        if self.entropy_coef:
            assert x.entropy is not None
            terms.append(-self.entropy_coef * x.entropy)
        return (sum(terms[1:], terms[0]) if terms else None), metrics


def _kl(x: Tensor, estimator: str) -> Tensor:
    """Per-token estimates of KL(pi || ref) from tokens of pi; x = logref - logp (J. Schulman, Approximating KL Divergence)."""
    if estimator == "k1":
        return -x
    if estimator == "k2":
        return x.square() / 2
    return x.exp() - x - 1


def _averaged(
    x: LossInputs, norm: LossNorm, per_token: Mapping[str, Tensor], per_sequence: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    tokens = x.token_count(norm)
    out = {name: _dot(value, x.mask) / tokens for name, value in per_token.items()}
    if per_sequence:
        share = x.token_weights(replace(_PER_SEQUENCE, sequences=norm.sequences))
        out |= {name: _dot(value, share) for name, value in per_sequence.items()}
    return out


def _dot(values: Tensor, weights: Tensor) -> Tensor:
    """sum(values x weights) in one pass, without gradient; values: what broadcasts to weights."""
    return torch.dot(values.detach().expand_as(weights).reshape(-1), weights.reshape(-1))


def _as_norm(norm: Any, default: NormMode) -> LossNorm:
    """A LossNorm from what a configuration may hold: a mode, a mapping of its fields, or None for `default`."""
    if norm is None:
        return LossNorm(default)
    if isinstance(norm, LossNorm):
        return norm
    if isinstance(norm, str):
        return LossNorm(norm)  # type: ignore[arg-type]  # checked there
    if isinstance(norm, Mapping):
        known = [f.name for f in fields(LossNorm)]
        for key in norm:
            if key not in known:
                raise ConfigError(f"unknown key 'norm.{key}'; {suggest(key, known)}")
        return LossNorm(**{"mode": default, **norm})
    raise ConfigError(f"norm is {norm!r}; give a mode, a mapping with mode, tokens, sequences, horizon, or a LossNorm")
