"""The shared part of all objectives with an importance ratio: the denominator, the level and the corrections."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from megatron_rl.errors import ConfigError
from megatron_rl.objectives.corrections import make_corrections
from megatron_rl.objectives.inputs import LossInputs
from megatron_rl.objectives.objective import Objective, TokenLoss
from megatron_rl.objectives.options import choice, nonnegative

DENOMINATORS = {"rollout": "logmu", "trainer_old": "logold"}
LEVELS = ("token", "sequence", "geometric", "cumulative")


@dataclass(frozen=True, kw_only=True)
class RatioObjective(Objective):
    """An objective on r = pi / pi_below.

    A correction that weighs must not weigh by a factor that the loss already contains. It may then only mask. This is
    the case with denominator `rollout`, and in methods whose weight is pi / mu whatever the denominator
    (`always_over_mu`).

    Attributes:
        ratio_level: what one ratio spans.
        ratio_denominator: the policy below the fraction bar. `rollout` (bypass) uses mu as the engine reported it: one
            ratio contains staleness and engine mismatch, and no extra forward pass is needed. `trainer_old` uses the
            trainer's own policy before the update; `corrections` then weigh or mask by pi_old / mu. If unset, it is
            `trainer_old` when a correction weighs, else `default_denominator`. With `always_over_mu` it names the
            policy that the mask of the method compares with.
        corrections: see `objectives/corrections.py`.
        log_ratio_coef: weight of (log r)^2 per token, added to the loss beside KL and entropy. Its gradient
            2 log_ratio_coef log r pulls every token back, whatever its advantage.
    """

    ratio_level: str = choice("token", ("token",), "what one ratio spans")
    ratio_denominator: str | None = choice(None, DENOMINATORS, "the policy below the fraction bar")
    corrections: Any = field(default=())
    log_ratio_coef: float = nonnegative(0.0, "weight of (log r)^2 of every token, a penalty")

    default_denominator: ClassVar[str] = "rollout"
    always_over_mu: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        corrections = make_corrections(self.corrections)
        weighing = [c.name for c in corrections if c.weighs]
        if weighing and self.always_over_mu:
            raise ConfigError(
                f"objective {self.name}: correction {weighing[0]} weighs by pi_old / mu, but its loss is always "
                "weighted by pi / mu; drop the correction, or set weight: false for a mask alone"
            )
        if self.ratio_denominator is None:
            object.__setattr__(self, "ratio_denominator", "trainer_old" if weighing else self.default_denominator)
        if weighing and self.ratio_denominator == "rollout":
            raise ConfigError(
                f"objective {self.name}: correction {weighing[0]} weighs by pi_old / mu, which the ratio of "
                "ratio_denominator: rollout already holds; set ratio_denominator: trainer_old, or weight: false for "
                "a mask alone"
            )
        object.__setattr__(self, "corrections", corrections)

    @property
    def below(self) -> str:
        """Name of the tensor of LossInputs that is the denominator of the ratio."""
        assert self.ratio_denominator is not None  # set in __post_init__
        return DENOMINATORS[self.ratio_denominator]

    @property
    def needs(self) -> frozenset[str]:
        own = {self.below, "logmu"} if self.always_over_mu else {self.below}
        return super().needs.union(own, *(correction.needs for correction in self.corrections))

    @abstractmethod
    def surrogate(self, x: LossInputs) -> TokenLoss:
        """Return the loss of the method without corrections; `x` is the same as in `per_token`."""

    def _terms(self, x: LossInputs) -> tuple[Tensor | None, dict[str, Tensor]]:
        terms, metrics = super()._terms(x)
        if not self.log_ratio_coef:
            return terms, metrics
        square = x.log_ratio(self.below).square()
        penalty = self.log_ratio_coef * square
        return penalty if terms is None else terms + penalty, metrics | {"log_ratio/square": square}

    def per_token(self, x: LossInputs) -> TokenLoss:
        token = self.surrogate(x)
        numerator = "logold" if self.below == "logold" else "logp"
        for correction in self.corrections:
            weight, mask, metrics = correction.apply(x, numerator)
            token = _scaled(token, weight, mask, metrics)
        return token


def _scaled(token: TokenLoss, weight: Tensor | None, mask: Tensor | None, metrics: Mapping[str, Tensor]) -> TokenLoss:
    loss, w = token.loss, token.weight
    for factor in (weight, mask):
        if factor is not None:
            loss, w = loss * factor, None if w is None else w * factor
    return replace(token, loss=loss, weight=w, metrics={**token.metrics, **metrics})
