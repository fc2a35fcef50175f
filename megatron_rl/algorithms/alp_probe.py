"""A few trajectories scored without the perturbation that the step's first update puts on them."""

from dataclasses import dataclass, field

import numpy as np

from megatron_rl.diagnostics.alp_effect import shift_record, spread_record
from megatron_rl.policy.actor import Policy, UpdateStats
from megatron_rl.types import Batch


@dataclass(frozen=True)
class Probe:
    """Clean log-probabilities [N] of the first N tokens of `part`, under the weights before its update."""

    part: Batch
    clean: np.ndarray = field(repr=False)

    def record(self, stats: UpdateStats) -> dict[str, float]:
        """What the noise did to these tokens. stats: of the update of `part`, on rank 0."""
        assert stats.logp is not None
        trained = np.flatnonzero(self.part.mask[: len(self.clean)] > 0)
        if not len(trained):
            return {}
        clean, perturbed = self.clean[trained], stats.logp[trained]
        record = shift_record(perturbed, clean)
        if self.part.logmu is not None:
            logmu = self.part.logmu[trained]
            record |= spread_record("alp/clean", clean, logmu) | spread_record("alp/perturbed", perturbed, logmu)
        return record


def probe(policy: Policy, part: Batch) -> Probe:
    """Score what of `part` fits into one micro-batch, at least one trajectory: one forward pass a step. Collective."""
    count = int(
        np.searchsorted(np.cumsum(part.lengths), policy.config.optimizer.tokens_per_microbatch // 2, side="right")
    )
    few = part.select(np.arange(max(1, count)))
    return Probe(part, policy.logprobs(few))
