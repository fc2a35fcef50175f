"""CPPO: a budget for the divergence of a response's prefix, in place of one bound per token (arXiv 2606.10968)."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_rl.objectives.inputs import NormMode
from megatron_rl.objectives.objective import LossInputs, TokenLoss, positive
from megatron_rl.objectives.options import nonnegative
from megatron_rl.objectives.ratio import RatioObjective

_QUANTILE = 0.9  # of the divergences of a response, Eq. 22


@dataclass(frozen=True, kw_only=True)
class CPPO(RatioObjective):
    r"""Divergence mask whose bound tightens with the position and with what the prefix has used of its budget.

        loss = -A r M,    r = pi / mu
        D_t = |pi - mu|,    Z_t = w_t D_t,    w_t = 1 - (1 - w_min) (t - 1) / (T - 1)                       (Eq. 9)
        c_t = min(delta, delta + b sum_{s<t} w_s - sum_{s<t} Z_s)                                           (Eq. 8)
        M = 0 if A (r - 1) > 0 and Z_t > c_t, else 1                                                       (Eq. 10)
        b = D's 90 % quantile over the response, limited to [delta_b, 2 delta_b]                           (Eq. 22)

    t counts the T trained tokens of a response; w_1 = 1. A move back toward mu is always allowed. With w_min 1 and a
    huge delta_b it is the mask of `dppo_tv`, on a ratio that is not truncated.
    """

    delta: float = positive(0.2, "bound of the weighted |pi - mu| of a token; the paper: 0.15 for dense models")
    w_min: float = positive(0.8, "weight of the last token's divergence; the first has 1", at_most=1.0)
    delta_b: float = nonnegative(0.02, "least budget that each token of the prefix adds; at most twice that is added")

    name: ClassVar = "cppo"
    default_norm: ClassVar[NormMode] = "token_mean"

    def surrogate(self, x: LossInputs) -> TokenLoss:
        """Return loss and weight, [B, T] each, from `logp`, `logmu` and `advantages` [B, T] of `x`."""
        ratio = x.ratio(self.below)
        divergence = (x.logp.detach().exp() - getattr(x, self.below).exp()).abs() * x.mask
        place = (x.running_sum(x.mask) - 1) / (x.sequence_sum(x.mask) - 1).clamp(min=1)
        weights = (1 - (1 - self.w_min) * place) * x.mask
        used = weights * divergence
        budget = x.sequence_quantile(divergence, _QUANTILE).clamp(self.delta_b, 2 * self.delta_b)
        left = budget * (x.running_sum(weights) - weights) - (x.running_sum(used) - used)
        bound = self.delta + left.clamp(max=0)
        over = (x.advantages * (ratio.detach() - 1) > 0) & (used > bound)
        keep = (~over).to(ratio.dtype)
        above, below = over & (x.advantages > 0), over & (x.advantages < 0)
        flags = {"mask/high": above, "mask/low": below, "cppo/prefix": over & (used <= self.delta)}
        return TokenLoss(
            loss=-x.advantages * ratio * keep,
            weight=keep,
            metrics={"divergence": divergence} | {name: flag.to(ratio.dtype) for name, flag in flags.items()},
            sequence_metrics={"cppo/budget": budget},
        )
