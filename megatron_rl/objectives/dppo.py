"""DPPO: tokens are masked by the divergence of their distribution, not by their ratio (arXiv 2602.04879)."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_rl.errors import ConfigError
from megatron_rl.objectives.inputs import NormMode
from megatron_rl.objectives.objective import LossInputs, TokenLoss, positive
from megatron_rl.objectives.options import MOST_TOP_K, choice, integer
from megatron_rl.objectives.ratio import RatioObjective

DEFAULT_DELTA = {"tv": 0.15, "kl": 0.05}

_EPSILON = 1e-8  # keeps the odds of a nearly certain token finite
_LEAST_REST = 1e-12  # lower limit of the mass of the tokens outside the top-K


@dataclass(frozen=True, kw_only=True)
class DPPO(RatioObjective):
    r"""Divergence mask: a token that moves away from q loses its gradient once its divergence exceeds delta.

        loss = -A sg[min(r, truncation)] M logp,    r = pi / mu
        -dloss/dlogp = A r w,    w = M min(r, truncation) / r
        M = 0 if D > delta_high, A > 0, pi > q  or  D > delta_low, A <= 0, pi < q;  else 1

    D is the divergence of pi from q, the policy that `ratio_denominator` names. With rollout, q is mu. With
    trainer_old, q is the trainer's own policy before the update (the `recompute` variants), while r stays pi / mu. A
    move back toward q is always allowed.
    """

    delta: float | None
    delta_low: float | None = positive(None, "bound of the divergence for A <= 0; delta when unset")
    delta_high: float | None = positive(None, "bound of the divergence for A > 0; delta when unset")
    truncation: float = positive(20.0, "upper bound of the weight pi / mu")

    default_norm: ClassVar[NormMode] = "seq_mean_token_sum_norm"
    always_over_mu: ClassVar = True

    @property
    def bounds(self) -> tuple[float, float]:
        """delta_low and delta_high; delta replaces each one that is unset."""
        assert self.delta is not None  # every subclass has a delta after construction
        low, high = self.delta_low, self.delta_high
        return self.delta if low is None else low, self.delta if high is None else high

    @abstractmethod
    def divergence_of(self, x: LossInputs) -> Tensor:
        """Return D, [B, T] without gradient, at least 0 up to rounding."""

    def surrogate(self, x: LossInputs) -> TokenLoss:
        """Return loss and weight w, [B, T] each, from `logp`, `logmu` and `advantages` [B, T] of `x`.

        With denominator `trainer_old`, `logold` is also needed.
        """
        low, high = self.bounds
        ratio, direction = x.ratio("logmu").detach(), x.log_ratio(self.below).detach()
        divergence = self.divergence_of(x)
        above = (x.advantages > 0) & (direction > 0) & (divergence > high)
        below = (x.advantages <= 0) & (direction < 0) & (divergence > low)
        weight = ratio.clamp(max=self.truncation) * ~(above | below)
        flags = {"mask/high": above, "mask/low": below, "weight/truncated": ratio > self.truncation}
        return TokenLoss(
            loss=-x.advantages * weight * x.logp,
            weight=weight / ratio,
            metrics={"divergence": divergence} | {name: flag.to(ratio.dtype) for name, flag in flags.items()},
        )


@dataclass(frozen=True, kw_only=True)
class DPPOTV(DPPO):
    """Binary total variation: the sampled token against all others. D = |pi - q|."""

    delta: float | None = positive(DEFAULT_DELTA["tv"], "bound of |pi - q|")

    name: ClassVar = "dppo_tv"

    def divergence_of(self, x: LossInputs) -> Tensor:
        base: Tensor = getattr(x, self.below)
        return (x.logp.detach().exp() - base.exp()).abs()


@dataclass(frozen=True, kw_only=True)
class DPPOKL(DPPO):
    """Binary KL: the sampled token against all others. D = q log(q / pi) + (1 - q) log((1 - q) / (1 - pi))."""

    delta: float | None = positive(DEFAULT_DELTA["kl"], "bound of the divergence, in nats")

    name: ClassVar = "dppo_kl"

    def divergence_of(self, x: LossInputs) -> Tensor:
        base: Tensor = getattr(x, self.below)
        others = _others(base)
        return -base.exp() * x.log_ratio(self.below).detach() + others * torch.log(
            (others + _EPSILON) / (_others(x.logp.detach()) + _EPSILON)
        )


@dataclass(frozen=True, kw_only=True)
class DPPOTopK(DPPO):
    """Divergence over the K most likely tokens of the engine, with all others in one bucket of at least 1e-12.

        tv:  D = (sum_K |p - q| + |p_rest - q_rest|) / 2
        kl:  D = sum_K p log(p / q) + p_rest log(p_rest / q_rest)

    p is the engine's distribution and q the trainer's. The sampled token alone decides whether a token moves away.
    `ratio_denominator` is always rollout, because no top-K of the trainer's old policy is stored.
    """

    divergence: str = choice("tv", tuple(DEFAULT_DELTA), "total variation or KL")
    top_k: int = integer(20, "how many of its likeliest tokens the engine reports", at_most=MOST_TOP_K)
    delta: float | None = positive(None, "bound of the divergence; unset: 0.15 for tv, 0.05 for kl")

    name: ClassVar = "dppo_topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio_denominator != "rollout":
            raise ConfigError(
                "objective dppo_topk: ratio_denominator is 'trainer_old', but the top-K of the trainer's old policy is "
                "not kept; set ratio_denominator: rollout, or use dppo_tv or dppo_kl"
            )
        if self.score_centering is not None and self.score_centering.top_k != self.top_k:
            raise ConfigError(
                f"objective dppo_topk: top_k is {self.top_k} and score_centering.top_k {self.score_centering.top_k}, "
                "but the engine reports one number of tokens: set both to the same"
            )
        if self.delta is None:
            object.__setattr__(self, "delta", DEFAULT_DELTA[self.divergence])

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"topk"}

    @property
    def topk(self) -> int:
        return self.top_k

    def divergence_of(self, x: LossInputs) -> Tensor:
        """Return D; `x.topk` holds logp of the trainer and logmu of the engine, [B, T, K] each, constants."""
        assert x.topk is not None
        logq_K, logp_K = x.topk[0].detach(), x.topk[1]
        p_K, q_K = logp_K.exp(), logq_K.exp()
        p_rest, q_rest = _rest(p_K), _rest(q_K)
        if self.divergence == "tv":
            return (p_K.sub_(q_K).abs_().sum(-1) + (p_rest - q_rest).abs()) / 2
        return (p_K * (logp_K - logq_K)).sum(-1) + p_rest * (p_rest / q_rest).log()


def _others(log_probability: Tensor) -> Tensor:
    """Return 1 - p, accurate also where p is nearly 1, and 0 where rounding made p exceed 1."""
    return -torch.expm1(log_probability).clamp(max=0)


def _rest(p_K: Tensor) -> Tensor:
    return (1 - p_K.sum(-1)).clamp(min=_LEAST_REST)
