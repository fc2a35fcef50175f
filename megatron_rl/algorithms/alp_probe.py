"""ALP's clean pass: a few trajectories scored without the noise that the step's first update adds."""

from dataclasses import dataclass, field

import numpy as np

from megatron_rl.diagnostics.alp_effect import shift_record, spread_record
from megatron_rl.policy.actor import Policy, UpdateStats
from megatron_rl.types import Batch


@dataclass(frozen=True)
class CleanScores:
    """Log-probabilities without noise, of the first N tokens of an update's batch, under the weights before it.

    Attributes:
        part: the batch of the update.
        logp: [N] float32.
    """

    part: Batch
    logp: np.ndarray = field(repr=False)

    def record(self, stats: UpdateStats) -> dict[str, float]:
        """Return the effect of the noise on these tokens. `stats` are those of the update of `part`. For rank 0."""
        assert stats.logp is not None
        trained = np.flatnonzero(self.part.mask[: len(self.logp)] > 0)
        if not len(trained):
            return {}
        clean, perturbed = self.logp[trained], stats.logp[trained]
        record = shift_record(perturbed, clean)
        if self.part.logmu is not None:
            logmu = self.part.logmu[trained]
            record |= spread_record("alp/clean", clean, logmu) | spread_record("alp/perturbed", perturbed, logmu)
        return record


def score_clean(policy: Policy, part: Batch) -> CleanScores:
    """Score without noise as many trajectories of `part` as fit into half a micro-batch, at least one. Collective.

    The cost is one forward pass a step.
    """
    budget = policy.settings.tokens_per_microbatch // 2
    count = int(np.searchsorted(np.cumsum(part.lengths), budget, side="right"))
    few = part.select(np.arange(min(len(part), max(1, count))))
    return CleanScores(part, policy.logprobs(few))
