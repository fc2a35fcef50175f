"""ERPD: distill a teacher that was trained far off policy (arXiv 2605.25582).

Stage 1 trains the teacher on a fixed batch with a weakly constrained loss: `erpd_mse` or `erpd_ce` (or `sapo`, `grpo`).
Stage 2 starts from the old policy again and follows the teacher's token advantages under a clip: `erpd_distill`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from megatron_rl.errors import UserError
from megatron_rl.objectives.grpo import PPO
from megatron_rl.objectives.inputs import NormMode
from megatron_rl.objectives.objective import LossInputs, Objective, TokenLoss, choice, positive

_POSITIVE = 0.5  # a trajectory with a reward below it is negative


@dataclass(frozen=True, kw_only=True)
class _Outcome(Objective):
    """An objective that uses the reward of a trajectory as the probability that it is right.

    Advantages are not used.
    """

    uses_advantages: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"rewards"}

    def check_values(self, x: LossInputs) -> None:
        assert x.rewards is not None
        low, high = x.rewards.aminmax()
        if low < 0 or high > 1:
            raise UserError(f"rewards reach from {low:g} to {high:g}; {self.name} needs them in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class ErpdMSE(_Outcome):
    r"""Squared error between the probability of every token and the outcome of its trajectory.

        loss = c (pi - R)^2,    R in {0, 1},    c = negative_weight if R < 0.5 else 1
        dloss/dlogp = 2 c (pi - R) pi

    Stage 1 of arXiv 2605.25582. Rewards must lie in [0, 1], because pi is a probability; other values have no meaning
    here. The gradient vanishes as pi^2 for negatives, and for positives as pi -> 0 and as pi -> 1. Early updates also
    lower the positives ("unlearning"); later ones raise them again. pi_positive in the log shows when this changes.
    """

    negative_weight: float = positive(1.0, "weight of trajectories with a reward below 0.5")

    name: ClassVar = "erpd_mse"
    default_norm: ClassVar[NormMode] = "token_mean"

    def per_token(self, x: LossInputs) -> TokenLoss:
        """Return the loss [B, T] from `logp` and `rewards` [B, T] of `x`; without a ratio there is no weight."""
        assert x.rewards is not None
        pi = x.logp.exp()
        loss = (pi - x.rewards).square()
        positives = (x.rewards >= _POSITIVE).to(pi.dtype)
        if self.negative_weight != 1:
            loss = loss * (positives + self.negative_weight * (1 - positives))
        return TokenLoss(
            loss=loss,
            metrics={
                f"{self.name}/pi": pi,
                f"{self.name}/positives": positives,
                f"{self.name}/pi_times_positives": pi.detach() * positives,
            },
        )

    def summary(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return pi_positive and pi_negative, the mean token probability of positive and of negative trajectories.

        A value is left out if there are no such trajectories.
        """
        names = [f"{self.name}/{name}" for name in ("pi", "positives", "pi_times_positives")]
        if not all(name in metrics for name in names):
            return {}
        pi, share, joint = (metrics[name] for name in names)
        out = {f"{self.name}/pi_positive": joint / share} if share > 0 else {}
        return out | ({f"{self.name}/pi_negative": (pi - joint) / (1 - share)} if share < 1 else {})


@dataclass(frozen=True, kw_only=True)
class ErpdCE(_Outcome):
    r"""Cross-entropy of trajectories, classified by their likelihood ratio to the old policy.

        R(y) = beta sum_t log(pi / pi_old)   (or beta mean_t),    l: reward in [0, 1]
        L_y = -l log sigma(R) - (1 - l) log(1 - sigma(R)),        L = mean of L_y over trajectories
        dL_y/dlogp_t = -beta (l - sigma(R))   (/ length for the mean)

    Stage 1 of arXiv 2605.25582 (which prints the likelihood without the minus sign). Rewards must lie in [0, 1]. The
    paper's beta lies in 0.001..0.05. Keep the default norm: it makes L the mean over trajectories.
    """

    beta: float = positive(0.01, "reward per nat of log-ratio")
    reduction: str = choice("sum", ("sum", "mean"), "how the log-ratios of a trajectory become one")

    name: ClassVar = "erpd_ce"
    default_norm: ClassVar[NormMode] = "seq_mean_token_sum"

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"logold"}

    def per_token(self, x: LossInputs) -> TokenLoss:
        """Return the loss [B, T] from `logp`, `logold` and `rewards` [B, T] of `x`.

        Its value is L_y / length; its gradient is the one of the class docstring.
        """
        assert x.rewards is not None
        log_ratio = x.log_ratio("logold")
        total = x.sequence_sum(log_ratio.detach())  # [B, 1], packed [1, T]
        length = x.sequence_sum(x.mask).clamp(min=1)
        mean = self.reduction == "mean"
        implicit = self.beta * (total / length if mean else total)
        likely = logsigmoid(implicit) - (1 - x.rewards) * implicit  # log(1 - sigma(R)) = log sigma(R) - R
        push = self.beta * (x.rewards - implicit.sigmoid())
        return TokenLoss(
            loss=-likely / length - (push / length if mean else push) * (log_ratio - log_ratio.detach()),
            sequence_metrics={
                f"{self.name}/implicit_reward": implicit,
                f"{self.name}/accuracy": ((implicit > 0) == (x.rewards >= _POSITIVE)).to(implicit.dtype),
            },
        )


@dataclass(frozen=True, kw_only=True)
class ErpdDistill(PPO):
    r"""PPO's clip on token advantages that come from a teacher instead of an outcome.

        A = whiten(log pi_e - log pi_den),    r = pi / pi_old,    loss as `ppo`

    Stage 2 of arXiv 2605.25582: an approximation of min KL(pi | pi_e) under KL(pi | pi_old) <= epsilon. `advantages`
    are [B, T]. pi_e, pi_den and pi_old are all computed by the trainer; otherwise A would contain the engine's noise.
    The paper gives no clip for this stage; 0.2 is PPO's.
    """

    name: ClassVar = "erpd_distill"
    default_denominator: ClassVar[str] = "trainer_old"
