"""ScaledPO: the policy gradient with its negative side scaled down; alpha 1 is the unscaled one (arXiv 2606.03070)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_rl.objectives.inputs import NormMode
from megatron_rl.objectives.objective import LossInputs, Objective, TokenLoss
from megatron_rl.objectives.options import nonnegative


@dataclass(frozen=True, kw_only=True)
class Naive(Objective):
    r"""REINFORCE with a group baseline and equal weight for every response.

        loss = -A logp;    L = (1/G) sum_g A_g S_g,    S_g = -mean_t logp_t, the mean token NLL of response g

    L_C of arXiv 2606.03070 with C = 1. It does not use a behavior policy, so it corrects neither staleness nor
    mismatch, and it has no trust region. The less likely a negative response is, the larger its term, and training
    collapses late.

    Metrics (their names begin with the objective's): naive_loss is the L above. Over a whole update, `summary` adds s_p
    and s_n, the means of S over positive and over negative responses weighted by |A|, and s_ratio = s_n / s_p.
    """

    name: ClassVar = "naive"
    default_norm: ClassVar[NormMode] = "seq_mean_token_mean"

    def per_token(self, x: LossInputs) -> TokenLoss:
        """Return the loss [B, T] from `logp` and `advantages` [B, T] of `x`; without a ratio there is no weight."""
        return TokenLoss(loss=-x.advantages * x.logp, sequence_metrics=self.scales(x))

    def scales(self, x: LossInputs) -> dict[str, Tensor]:
        """Return tensors [B, T] whose sequence means are naive_loss and the sums that s_p and s_n are computed from."""
        logp = x.logp.detach()
        naive, positive = -x.advantages * logp, x.advantages.relu()
        negative = positive - x.advantages
        found = {
            "naive_loss": naive,
            "pull": -positive * logp,
            "push": -negative * logp,
            "positive": positive,
            "negative": negative,
        }
        return {f"{self.name}/{name}": value for name, value in found.items()}

    def summary(self, metrics: Mapping[str, float]) -> dict[str, float]:
        pull, push, positive, negative = (
            metrics.get(f"{self.name}/{k}", 0.0) for k in ("pull", "push", "positive", "negative")
        )
        if positive <= 0 or negative <= 0 or pull <= 0:
            return {}
        s_p, s_n = pull / positive, push / negative
        return {f"{self.name}/s_p": s_p, f"{self.name}/s_n": s_n, f"{self.name}/s_ratio": s_n / s_p}


@dataclass(frozen=True, kw_only=True)
class ScaledPO(Naive):
    r"""Policy gradient with its negative side multiplied by a constant alpha.

        loss = -C A logp,    C = 1 if A >= 0 else alpha

    "SPO" of arXiv 2606.03070, Eq. of L_C. alpha 1 is `naive`; alpha 0 imitates positive responses only. The two sides
    cancel where s_n / s_p = 1 / alpha, whereas `asympo` balances them at every scale. The coefficients of a group add
    up to (1 - alpha) times its positive part: there is a net push upwards, under which entropy may fall faster.
    """

    alpha: float = nonnegative(0.2, "factor of negative advantages", at_most=1.0)

    name: ClassVar = "scaled_po"

    def per_token(self, x: LossInputs) -> TokenLoss:
        """Return the loss [B, T] from `logp` and `advantages` [B, T] of `x`; without a ratio there is no weight."""
        scaled = torch.where(x.advantages < 0, self.alpha * x.advantages, x.advantages)
        return TokenLoss(loss=-scaled * x.logp, sequence_metrics=self.scales(x))
