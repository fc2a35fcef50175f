"""SimplePO: a quadratic penalty on the importance ratio (arXiv 2401.16025)."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_rl.objectives.inputs import NormMode
from megatron_rl.objectives.objective import LossInputs, TokenLoss, positive
from megatron_rl.objectives.ratio import RatioObjective


@dataclass(frozen=True, kw_only=True)
class SimplePO(RatioObjective):
    r"""Penalize the squared shift of the ratio, in proportion to the advantage.

        loss = -A r + |A| (r - 1)^2 / (2 epsilon)
        -dloss/dlogp = A r w,    w = 1 - sign(A) (r - 1) / epsilon

    A diverging token (A (r - 1) > 0) is damped, and pulled back once |r - 1| > epsilon; a converging one is pushed harder.
    The boundary is one on the ratio, which a token rare under mu meets at once: DRPO, whose loss this is with
    epsilon = delta / mu, has it on the probability.
    """

    epsilon: float = positive(0.2, "half-width of the trust region, in units of the ratio")

    name: ClassVar = "simple_po"
    default_norm: ClassVar[NormMode] = "token_mean"

    def surrogate(self, x: LossInputs) -> TokenLoss:
        """x: logp, logmu or logold, advantages [B, T] -> loss, weight [B, T]."""
        ratio = x.ratio(self.below)
        shift = ratio - 1
        penalty = x.advantages.abs() * shift.square() / (2 * self.epsilon)
        weight = 1 - x.advantages.sign() * shift.detach() / self.epsilon
        return TokenLoss(
            loss=penalty - x.advantages * ratio,
            weight=weight,
            metrics={"penalty": penalty, "corrective": (weight < 0).to(ratio.dtype)},
        )
