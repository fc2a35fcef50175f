"""GRPO: PPO's clipped surrogate on group advantages (arXiv 2402.03300, 1707.06347; dual clip 1912.09729)."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_rl.objectives.base import LossInputs, Objective, TokenLoss, choice, positive

_TENSOR = {"rollout": "logmu", "trainer_old": "logold"}


@dataclass(frozen=True, kw_only=True)
class GRPO(Objective):
    r"""Stop pushing a token once its ratio has left [1 - clip_low, 1 + clip_high] in the direction of the push.

        loss = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high));    A < 0: loss = min(loss, -A dual_clip)
        -dloss/dlogp = A r w,    w = 0 if (A > 0, r > 1 + clip_high) or (A < 0, r < 1 - clip_low)
                                        or (A < 0, r > dual_clip), else 1

    r = pi / mu with denominator `rollout` (bypass: staleness and engine mismatch in one ratio, no extra forward pass),
    pi / pi_old with `trainer_old`.
    """

    clip_low: float = positive(0.2, "the ratio is bounded below by 1 - clip_low", at_most=1.0)
    clip_high: float = positive(0.2, "the ratio is bounded above by 1 + clip_high")
    dual_clip: float | None = positive(None, "bound of the ratio for A < 0", above=1.0)
    denominator: str = choice("rollout", _TENSOR, "the policy below the fraction bar")

    name: ClassVar = "grpo"
    default_norm: ClassVar = "seq_mean_token_mean"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({_TENSOR[self.denominator]})

    def per_token(self, x: LossInputs) -> TokenLoss:
        """x: logp, logmu or logold, advantages [B, T] -> loss, weight [B, T]."""
        ratio = x.ratio(_TENSOR[self.denominator])
        low, high = 1 - self.clip_low, 1 + self.clip_high
        dual = self.dual_clip if self.dual_clip is not None else float("inf")
        # Written by region, not with min and max, whose subgradients halve where two branches tie.
        above = (x.advantages > 0) & (ratio > high)
        below = (x.advantages < 0) & (ratio < low)
        far = (x.advantages < 0) & (ratio > dual)
        clipped = above | below | far
        bounded = ratio.masked_fill(above, high).masked_fill(below, low).masked_fill(far, dual)
        flags = {"clip/high": above, "clip/low": below, "clip/dual": far}
        return TokenLoss(
            loss=-x.advantages * bounded,
            weight=(~clipped).to(ratio.dtype),
            metrics={name: flag.to(ratio.dtype) for name, flag in flags.items()},
        )
