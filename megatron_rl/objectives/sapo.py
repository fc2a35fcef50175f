"""SAPO: a smooth gate on the importance ratio in place of the clip (arXiv 2511.20347)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_rl.objectives.inputs import NormMode
from megatron_rl.objectives.objective import LossInputs, TokenLoss, positive
from megatron_rl.objectives.ratio import RatioObjective


@dataclass(frozen=True, kw_only=True)
class SAPO(RatioObjective):
    r"""Smooth gate: the gradient of a token decreases as its ratio leaves 1, faster for negative advantages.

        loss = -A (4 / tau) s,    s = sigmoid(tau (r - 1)),    tau = tau_pos if A > 0 else tau_neg
        -dloss/dlogp = A r w,    w = 4 s (1 - s)

    w is 1 on policy and falls toward 0 on both sides. The factor 4 / tau makes this 1 independent of tau.
    """

    tau_pos: float = positive(1.0, "steepness of the gate for A > 0")
    tau_neg: float = positive(1.05, "steepness of the gate for A <= 0")

    name: ClassVar = "sapo"
    default_norm: ClassVar[NormMode] = "seq_mean_token_mean"

    def surrogate(self, x: LossInputs) -> TokenLoss:
        """Return loss and weight w, [B, T] each, from `logp`, `logmu` or `logold`, and `advantages` [B, T] of `x`."""
        ratio = x.ratio(self.below)
        tau = torch.full_like(x.advantages, self.tau_neg).masked_fill(x.advantages > 0, self.tau_pos)
        gate = torch.sigmoid(tau * (ratio - 1))
        weight = 4 * (gate * (1 - gate)).detach()
        return TokenLoss(loss=-x.advantages * 4 / tau * gate, weight=weight, metrics={"gate": weight})
