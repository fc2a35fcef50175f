"""GSPO: PPO's clipped surrogate on one length-normalized ratio per sequence (arXiv 2507.18071)."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_rl.objectives.grpo import PPO
from megatron_rl.objectives.inputs import NormMode
from megatron_rl.objectives.objective import positive
from megatron_rl.objectives.options import choice


@dataclass(frozen=True, kw_only=True)
class GSPO(PPO):
    r"""Clipped surrogate on the geometric mean of the token ratios of a sequence.

        s = exp(mean_t log(pi / pi_below)),    loss_t = max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high))
        -dloss_t/dlogp_t = A s w,    w = 0 if (A > 0, s > 1 + clip_high) or (A < 0, s < 1 - clip_low), else 1

    Eq. 5 to 7. Every token has the value s and its own gradient (GSPO-token, Eq. 13 and 14). Under the default norm
    these gradients add up to the gradient of the mean over sequences of min(s A, clip(s) A). A mean over many tokens
    changes little, so the clip ranges are a thousandth of those for tokens.
    """

    clip_low: float = positive(3e-4, "the ratio is bounded below by 1 - clip_low", at_most=1.0)
    clip_high: float = positive(4e-4, "the ratio is bounded above by 1 + clip_high")
    ratio_level: str = choice("geometric", ("geometric",), "what one ratio spans")

    name: ClassVar = "gspo"
    default_norm: ClassVar[NormMode] = "seq_mean_token_mean"
