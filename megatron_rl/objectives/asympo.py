"""ASymPO: the log-likelihood of every response is divided by its own scale (arXiv 2606.03070)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megatron_rl.errors import ConfigError
from megatron_rl.objectives.objective import LossInputs, TokenLoss, positive
from megatron_rl.objectives.scaled_po import Naive


@dataclass(frozen=True, kw_only=True)
class ASymPO(Naive):
    r"""Policy gradient that divides the loss of a response by its mean token NLL, so that both signs weigh the same.

        loss = -A l / sg(max(S, floor)),    S_g = -mean_t l_t over response g
        l = min(logp, log p_high) where A >= 0;   l = max(logp, log p_low) where A < 0;   logp where a bound is unset

    The divisor is held constant. With its norm, L = (1/G) sum_g A_g S_g / sg(S_g), which is L_C of arXiv 2606.03070
    with C = 1 / sg(S). The bounds are the stabilized form of its appendix C. A bounded token gets no gradient but still
    counts in S and in the length. Elsewhere dL/dlogp_t = -A_g / (G m_g S_g): responses of zero-sum advantages balance,
    whatever their length and likelihood. The loss is then always 0 and carries no information; read naive_loss, s_p,
    s_n and s_ratio in the log instead.

    No behavior policy is used, and nothing bounds the step. A confident response has a small S and a large coefficient:
    `floor` bounds it at |A| / floor, p_high at |A| / -log p_high. The paper's bounds lie in 0.01..0.05 and 0.95..0.99.
    Advantages should sum to 0 in each group. Keep the default norm: a token mean breaks the balance.
    """

    p_low: float | None = positive(None, "least probability of a token where A < 0", at_most=1.0)
    p_high: float | None = positive(None, "largest probability of a token where A >= 0", at_most=1.0)
    floor: float = positive(1e-4, "least value of the divisor, nats per token")

    name: ClassVar = "asympo"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p_low is not None and self.p_high is not None and self.p_low >= self.p_high:
            raise ConfigError(
                f"objective {self.name}: p_low is {self.p_low:g} and p_high {self.p_high:g}; "
                "p_low must be the smaller one"
            )

    def per_token(self, x: LossInputs) -> TokenLoss:
        """Return the loss [B, T] from `logp` and `advantages` [B, T] of `x`; without a ratio there is no weight."""
        logp, clipped = self._bounded(x)
        scale = -x.sequence_mean(logp.detach()).clamp(max=-self.floor)  # [B, 1], packed [1, T]
        return TokenLoss(
            loss=logp * (-x.advantages / scale),
            metrics={f"{self.name}/{name}": flag.to(logp.dtype) for name, flag in clipped.items()},
            sequence_metrics=self.scales(x),
        )

    def _bounded(self, x: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the bounded logp [B, T], constant where a bound applies, and the flags of the tokens at each bound."""
        logp, clipped = x.logp, {}
        if self.p_high is not None:
            limit = math.log(self.p_high)
            # On padding logp and A are 0, so padding would pass this test; it must not enter the sum.
            clipped["clip_high"] = (x.advantages >= 0) & (logp > limit) & x.mask.bool()
            logp = logp.masked_fill(clipped["clip_high"], limit)
        if self.p_low is not None:
            limit = math.log(self.p_low)
            clipped["clip_low"] = (x.advantages < 0) & (x.logp < limit)
            logp = logp.masked_fill(clipped["clip_low"], limit)
        return logp, clipped
