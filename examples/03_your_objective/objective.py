"""Objective: REINFORCE whose importance ratio is bounded smoothly, ratio -> bound tanh(ratio / bound)."""

from dataclasses import dataclass

from megatron_rl.objectives import RatioObjective, TokenLoss, positive


@dataclass(frozen=True, kw_only=True)
class Bounded(RatioObjective):
    """loss = -A bound tanh(r / bound), with r = pi / mu."""

    bound: float = positive(3.0, "largest value of the bounded ratio")

    def surrogate(self, x):
        """Return the loss per token; `x` has logp, logmu, advantages and mask, each [B, T]."""
        ratio = x.ratio(self.below)
        bounded = self.bound * (ratio / self.bound).tanh()
        return TokenLoss(-x.advantages * bounded, metrics={"bounded_ratio": bounded})
