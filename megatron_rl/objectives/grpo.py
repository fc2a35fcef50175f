"""PPO's clipped surrogate and its kin: ppo, grpo, dapo (arXiv 1707.06347, 2402.03300, 2503.14476)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_rl.objectives.inputs import NormMode
from megatron_rl.objectives.objective import LossInputs, TokenLoss, positive
from megatron_rl.objectives.options import choice
from megatron_rl.objectives.ratio import LEVELS, RatioObjective


@dataclass(frozen=True, kw_only=True)
class PPO(RatioObjective):
    r"""Stop pushing a token once its ratio has left [1 - clip_low, 1 + clip_high] in the direction of the push.

        loss = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high));    A < 0: loss = min(loss, -A dual_clip)
        -dloss/dlogp = A r w,    w = 0 if (A > 0, r > 1 + clip_high) or (A < 0, r < 1 - clip_low)
                                        or (A < 0, r > dual_clip), else 1

    Eq. 7 of arXiv 1707.06347; dual clip arXiv 1912.09729. At level `sequence` or `geometric` one ratio stands for a whole
    sequence and a clip silences all of it; presets of arXiv 2603.19470: 0.2 / 0.28 for tokens, 0.5 / 3.0 for sequences.
    """

    clip_low: float = positive(0.2, "the ratio is bounded below by 1 - clip_low", at_most=1.0)
    clip_high: float = positive(0.2, "the ratio is bounded above by 1 + clip_high")
    dual_clip: float | None = positive(None, "bound of the ratio for A < 0", above=1.0)
    level: str = choice("token", LEVELS, "what one ratio spans")

    name: ClassVar = "ppo"
    default_norm: ClassVar[NormMode] = "token_mean"

    def surrogate(self, x: LossInputs) -> TokenLoss:
        """x: logp, logmu or logold, advantages [B, T] -> loss, weight [B, T]."""
        ratio = x.ratio(self.below, self.level)  # type: ignore[arg-type]  # checked when built
        low, high = 1 - self.clip_low, 1 + self.clip_high
        # Each sign has its own bounds. Not min and max over both branches: their subgradients halve where two tie.
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
    """PPO's surrogate on group advantages, every sequence of equal weight (arXiv 2402.03300, Eq. 3)."""

    name: ClassVar = "grpo"
    default_norm: ClassVar[NormMode] = "seq_mean_token_mean"


@dataclass(frozen=True, kw_only=True)
class DAPO(PPO):
    """PPO's surrogate with the upper clip raised and every token of equal weight (arXiv 2503.14476, Eq. 8 to 12).

    Its penalty on overlong responses belongs to the reward: `objectives.advantages.overlong_penalty`.
    """

    clip_high: float = positive(0.28, "the ratio is bounded above by 1 + clip_high")

    name: ClassVar = "dapo"
