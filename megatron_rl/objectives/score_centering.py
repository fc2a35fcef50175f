"""Score centering: the mean of the score under the engine's policy is subtracted (arXiv 2609.20807, Eq. 14).

Tokens are sampled from q, the engine's policy, and scored under p, the trainer's. If the two differ, the score has a
mean under q that is not 0: a drift, the same in every step, whatever the advantages. With w the weight p / q that the
loss applies, possibly cut off, the drift is sum_v q(v) w(v) grad log p(v) over the vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_rl.errors import ConfigError, did_you_mean
from megatron_rl.objectives.options import MOST_TOP_K, checked, choice, integer, nonnegative, positive

_LEAST_REST = 1e-6  # lower limit of the trainer's mass outside the top-K, that of NeMo-RL
_BOUNDS = {"none": (0.0, 1.0), "tis": (0.0, 2.0), "icepop": (0.5, 5.0)}  # those of the corrections of the same names


@dataclass(frozen=True, kw_only=True)
class ScoreCentering:
    r"""The term A C, added to the loss of any objective with advantages.

        C = sum_{v in H} sg(m(v) - alpha p(v)) log p(v)
        rho = (1 - sum_H q) / max(1 - sum_H p, 1e-6)

        none     m = q                               alpha = rho
        tis      m = clamp(p, low q, high q)         alpha = clamp(1, low rho, high rho)
        icepop   m = p if low <= p/q <= high else 0  alpha = 1 if low <= 1/rho <= high else 0

    H are the engine's K most likely tokens. The tail, outside H, is modeled as q = rho p; because the mean of the score
    under p is 0, it costs no more than the head. The mode must be the weight that the loss applies to a token.
    """

    mode: str = choice("none", tuple(_BOUNDS), "weight that the loss applies to a sampled token")
    top_k: int = integer(MOST_TOP_K, "how many of its likeliest tokens the engine reports", at_most=MOST_TOP_K)
    low: float = nonnegative(0.0, "lower bound of p / q (tis, icepop); unset: that of the correction of this name")
    high: float = positive(1.0, "upper bound of p / q (tis, icepop); unset: that of the correction of this name")

    needs: ClassVar[frozenset[str]] = frozenset({"topk", "logmu"})

    def __post_init__(self) -> None:
        for option in fields(self):
            object.__setattr__(self, option.name, checked("score_centering", option, getattr(self, option.name)))
        if self.mode != "none" and self.low >= self.high:
            raise ConfigError(
                f"score_centering: low is {self.low:g} and high {self.high:g}; low must be the smaller one"
            )

    def term(self, logp_K: Tensor, logq_K: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return C [B, T], whose gradient is the drift, and metrics [B, T].

        Args:
            logp_K: log-probabilities of the engine's top-K tokens under the policy, [B, T, K], differentiable.
            logq_K: the same under the engine, [B, T, K].
        """
        p, q = logp_K.detach().exp(), logq_K.exp()
        tail = (1 - q.sum(-1)).clamp(min=0)
        rho = tail / (1 - p.sum(-1)).clamp(min=_LEAST_REST)
        mass, alpha = self._mass(p, q, rho)
        coefficient = mass - alpha[..., None] * p
        metrics = {"centering/size": coefficient.abs().sum(-1), "centering/tail": tail}
        return (coefficient * logp_K).sum(-1), metrics

    def _mass(self, p: Tensor, q: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
        """Return m [B, T, K] and alpha [B, T]."""
        if self.mode == "none":
            return q, rho
        if self.mode == "tis":
            return torch.clamp(p, self.low * q, self.high * q), (self.low * rho).clamp(min=1).minimum(self.high * rho)
        kept = (p >= self.low * q) & (p <= self.high * q)
        tail_kept = (rho * self.low <= 1) & (rho * self.high >= 1)
        return p * kept, tail_kept.to(rho.dtype)


def make_centering(spec: Any) -> ScoreCentering | None:
    """Return the centering of a mapping such as `{mode: tis, high: 2.0}`, None for None.

    Raises:
        ConfigError: a key or a value is illegal.
    """
    if spec is None or isinstance(spec, ScoreCentering):
        return spec
    if not isinstance(spec, Mapping):
        raise ConfigError(f"score_centering is {spec!r}; it must be a mapping such as {{mode: none, top_k: 64}}")
    keys = [option.name for option in fields(ScoreCentering)]
    for key in spec:
        if key not in keys:
            raise ConfigError(f"score_centering has no key '{key}'; {did_you_mean(key, keys)}")
    low, high = _BOUNDS.get(str(spec.get("mode", "none")), _BOUNDS["none"])
    return ScoreCentering(**{"low": low, "high": high, **spec})
