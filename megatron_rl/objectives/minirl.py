"""MiniRL: REINFORCE with the full importance weight and PPO's clip as a mask (arXiv 2512.01374)."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_rl.objectives.inputs import NormMode
from megatron_rl.objectives.objective import LossInputs, TokenLoss, positive
from megatron_rl.objectives.ratio import RatioObjective


@dataclass(frozen=True, kw_only=True)
class MiniRL(RatioObjective):
    r"""REINFORCE with weight pi / mu (mu of the engine) and a mask by pi / pi_old (the trainer's old policy).

        loss = -A sg[min(r, truncation)] M logp,    r = pi / mu
        -dloss/dlogp = A r w,    w = M min(r, truncation) / r
        M = 0 if (A > 0, r' > 1 + clip_high) or (A < 0, r' < 1 - clip_low), else 1;    r' = pi / pi_old

    The weight contains both the engine's mismatch and the staleness; the mask depends on staleness alone.
    `ratio_denominator` names the policy below r': trainer_old as in the paper, or rollout. With rollout, r' = r and
    no extra forward pass is needed. The paper sums over tokens and warns against dividing by each response's own
    length. token_mean divides by a count common to all responses.
    """

    clip_low: float = positive(0.2, "tokens of A < 0 are dropped below 1 - clip_low", at_most=1.0)
    clip_high: float = positive(0.27, "tokens of A > 0 are dropped above 1 + clip_high")
    truncation: float = positive(5.0, "upper bound of the weight pi / mu")

    name: ClassVar = "minirl"
    default_norm: ClassVar[NormMode] = "token_mean"
    default_denominator: ClassVar = "trainer_old"
    always_over_mu: ClassVar = True

    def surrogate(self, x: LossInputs) -> TokenLoss:
        """Return loss and weight w, [B, T] each, from `logp`, `logmu` and `advantages` [B, T] of `x`.

        With denominator `trainer_old`, `logold` is also needed.
        """
        ratio, moved = x.ratio("logmu").detach(), x.ratio(self.below).detach()
        above = (x.advantages > 0) & (moved > 1 + self.clip_high)
        below = (x.advantages < 0) & (moved < 1 - self.clip_low)
        weight = ratio.clamp(max=self.truncation) * ~(above | below)
        flags = {"clip/high": above, "clip/low": below, "weight/truncated": ratio > self.truncation}
        return TokenLoss(
            loss=-x.advantages * weight * x.logp,
            weight=weight / ratio,
            metrics={name: flag.to(ratio.dtype) for name, flag in flags.items()},
        )
