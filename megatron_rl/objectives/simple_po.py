"""SimplePO: a quadratic penalty on the importance ratio (arXiv 2401.16025)."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_rl.objectives.inputs import NormMode
from megatron_rl.objectives.objective import LossInputs, TokenLoss, positive
from megatron_rl.objectives.ratio import RatioObjective


@dataclass(frozen=True, kw_only=True)
class SimplePO(RatioObjective):
    r"""Quadratic penalty on the shift of the ratio, in proportion to the advantage.

        loss = -A r + |A| (r - 1)^2 / (2 epsilon)
        -dloss/dlogp = A r w,    w = 1 - sign(A) (r - 1) / epsilon

    A diverging token (A (r - 1) > 0) is damped, and is pulled back once |r - 1| > epsilon. A converging token gets a
    larger weight. The boundary is one on the ratio, which a token rare under mu reaches at once. DRPO is this loss with
    epsilon = delta / mu; its boundary is one on the probability.
    """

    epsilon: float = positive(0.2, "half-width of the trust region, in units of the ratio")

    name: ClassVar = "simple_po"
    default_norm: ClassVar[NormMode] = "token_mean"

    def surrogate(self, x: LossInputs) -> TokenLoss:
        """Return loss and weight w, [B, T] each, from `logp`, `logmu` or `logold`, and `advantages` [B, T] of `x`."""
        ratio = x.ratio(self.below)
        shift = ratio - 1
        penalty = x.advantages.abs() * shift.square() / (2 * self.epsilon)
        weight = 1 - x.advantages.sign() * shift.detach() / self.epsilon
        return TokenLoss(
            loss=penalty - x.advantages * ratio,
            weight=weight,
            metrics={"penalty": penalty, "corrective": (weight < 0).to(ratio.dtype)},
        )
