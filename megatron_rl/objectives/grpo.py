"""PPO's clipped surrogate and its variants: ppo, grpo, dapo (arXiv 1707.06347, 2402.03300, 2503.14476)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_rl.objectives.inputs import NormMode
from megatron_rl.objectives.objective import LossInputs, TokenLoss, positive
from megatron_rl.objectives.options import choice
from megatron_rl.objectives.ratio import LEVELS, RatioObjective


@dataclass(frozen=True, kw_only=True)
class PPO(RatioObjective):
    r"""Clipped surrogate: no gradient for a token whose ratio has left the clip range in the direction of the update.

        loss = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high));    A < 0: loss = min(loss, -A dual_clip)
        -dloss/dlogp = A r w,    w = 0 if (A > 0, r > 1 + clip_high) or (A < 0, r < 1 - clip_low)
                                        or (A < 0, r > dual_clip), else 1

    Eq. 7 of arXiv 1707.06347; the dual clip is from arXiv 1912.09729. At level `sequence` or `geometric` one ratio
    stands for a whole sequence, and a clip removes the gradient of all its tokens. Presets of arXiv 2603.19470: 0.2 /
    0.28 for tokens, 0.5 / 3.0 for sequences.
    """

    clip_low: float = positive(0.2, "the ratio is bounded below by 1 - clip_low", at_most=1.0)
    clip_high: float = positive(0.2, "the ratio is bounded above by 1 + clip_high")
    dual_clip: float | None = positive(None, "bound of the ratio for A < 0", above=1.0)
    ratio_level: str = choice("token", LEVELS, "what one ratio spans")

    name: ClassVar = "ppo"
    default_norm: ClassVar[NormMode] = "token_mean"

    def surrogate(self, x: LossInputs) -> TokenLoss:
        """Return loss and weight w, [B, T] each, from `logp`, `logmu` or `logold`, and `advantages` [B, T] of `x`."""
        ratio = x.ratio(self.below, self.ratio_level)  # type: ignore[arg-type]  # checked in __post_init__
        low, high = 1 - self.clip_low, 1 + self.clip_high
        # Each sign of A has its own bounds. min and max over both branches would halve the subgradients at a tie.
        positive = x.advantages.relu()
        bounded = positive * ratio.clamp(max=high) + (x.advantages - positive) * ratio.clamp(low, self.dual_clip)
        raised, lowered = x.advantages > 0, x.advantages < 0
        flags = {"clip/high": raised & (ratio > high), "clip/low": lowered & (ratio < low)}
        if self.dual_clip is not None:
            flags["clip/dual"] = lowered & (ratio > self.dual_clip)
        metrics = {name: flag.to(ratio.dtype) for name, flag in flags.items()}
        return TokenLoss(loss=-bounded, weight=1 - sum(metrics.values(), torch.zeros_like(ratio)), metrics=metrics)


@dataclass(frozen=True, kw_only=True)
class GRPO(PPO):
    """PPO's surrogate on group advantages, with equal weight for every sequence (arXiv 2402.03300, Eq. 3)."""

    name: ClassVar = "grpo"
    default_norm: ClassVar[NormMode] = "seq_mean_token_mean"


@dataclass(frozen=True, kw_only=True)
class DAPO(PPO):
    """PPO's surrogate with a raised upper clip and equal weight for every token (arXiv 2503.14476, Eq. 8 to 12).

    Its penalty on overlong responses is part of the reward: `objectives.advantages.overlong_penalty`.
    """

    clip_high: float = positive(0.28, "the ratio is bounded above by 1 + clip_high")

    name: ClassVar = "dapo"
