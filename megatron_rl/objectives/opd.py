"""OPD: on-policy distillation. The student follows a teacher on its own samples."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_rl.objectives.inputs import NormMode
from megatron_rl.objectives.objective import LossInputs, TokenLoss
from megatron_rl.objectives.ratio import RatioObjective


@dataclass(frozen=True, kw_only=True)
class OPD(RatioObjective):
    r"""Policy gradient of the reverse KL to a teacher, estimated from the sampled tokens.

        loss = -A r,    A = sg(log pi_ref - log pi),    r = pi / mu
        E_mu[dloss/dlogp . dlogp/dtheta] = d KL(pi | pi_ref) / dtheta, position by position

    pi_ref is the teacher: the folder `model.reference`. Rewards are not used. A is limited to +-20, as every log-ratio
    is. NeMo-RL's MOPD (after MiMo-V2-Flash) and Tinker have the student's log-probability from before the step in A;
    in the first update of a step that is the one here. In later updates theirs goes on pushing a student that has
    reached the teacher, which this one does not. Beyond the corrections there is no trust region.
    """

    name: ClassVar = "opd"
    default_norm: ClassVar[NormMode] = "token_mean"
    uses_advantages: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"logref"}

    def surrogate(self, x: LossInputs) -> TokenLoss:
        """Return the loss [B, T] from `logp`, `logref` and `logmu` or `logold` [B, T] of `x`.

        There is no weight: the method's advantage is not the one of `x`.
        """
        distance = x.log_ratio("logref").detach()
        return TokenLoss(loss=distance * x.ratio(self.below), metrics={"opd/distance": distance})
