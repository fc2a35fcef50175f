"""CISPO: REINFORCE weighted by a clipped importance ratio (arXiv 2506.13585, Eq. 4 and 5)."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_rl.objectives.inputs import NormMode
from megatron_rl.objectives.objective import LossInputs, TokenLoss, positive
from megatron_rl.objectives.ratio import RatioObjective


@dataclass(frozen=True, kw_only=True)
class CISPO(RatioObjective):
    r"""REINFORCE with a bounded weight; no token loses its gradient.

        loss = -sg[clip(r, 1 - clip_low, 1 + clip_high)] A logp
        -dloss/dlogp = A r w,    w = clip(r, 1 - clip_low, 1 + clip_high) / r

    The paper sets no lower bound (clip_low = 1) and tunes only the upper one, without printing its value. clip_high = 4
    limits the weight to 5. The value of the loss has no meaning; only its gradient does.
    """

    clip_low: float = positive(1.0, "the weight is bounded below by 1 - clip_low; 1 is no bound", at_most=1.0)
    clip_high: float = positive(4.0, "the weight is bounded above by 1 + clip_high")

    name: ClassVar = "cispo"
    default_norm: ClassVar[NormMode] = "token_mean"

    def surrogate(self, x: LossInputs) -> TokenLoss:
        """Return loss and weight w, [B, T] each, from `logp`, `logmu` or `logold`, and `advantages` [B, T] of `x`."""
        ratio = x.ratio(self.below).detach()
        low, high = 1 - self.clip_low, 1 + self.clip_high
        clipped = ratio.clamp(low, high)
        return TokenLoss(
            loss=-clipped * x.advantages * x.logp,
            weight=clipped / ratio,
            metrics={"clip/high": (ratio > high).to(ratio.dtype), "clip/low": (ratio < low).to(ratio.dtype)},
        )
