"""A function that the ranks of a group run: they train, and update an engine that serves.

The common arguments are described in `tests.parallel.steps`.
"""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.engines.pool import EnginePool, GenerationRequest, SamplingParams
from megatron_rl.policy.actor import Policy
from megatron_rl.types import Batch
from megatron_rl.weight_sync.sync import WeightSync
from megatron_rl.weight_sync.transports.tensor import TensorTransport
from tests.disk_sync import disk_sync
from tests.parallel.steps import exported, make_policy, noted_update

PROMPTS = [(5, 9, 11), (3,), tuple(range(20, 60))]


def update_live_engine(
    model: Path, layout: dict[str, Any], url: str, staging: Path | None = None, **sections: Any
) -> list[float]:
    """Return by how much an engine's log-probabilities differ from the policy's, at three moments.

    The engine serves the same folder. The moments: at the start, when the policy has made one update, and when this
    update was pushed.

    Args:
        model: the folder.
        layout: as in `steps`.
        url: the engine.
        staging: folder for the weights; None: they go through memory.
        sections: as in `steps`.
    """
    optimizer = {"lr": 1e-2, "eps": 1e-8, "grad_clip": 1.0}
    policy = make_policy(model, layout, optimizer=optimizer, rollout={"temperature": 1.0}, **sections)
    pool = EnginePool([url], timeout_s=120) if policy.mesh.rank == 0 else None
    group = policy.mesh.control
    if staging is None:
        sync = WeightSync(pool, policy.source, TensorTransport(1 << 20), group=group)
    else:
        sync = disk_sync(pool, policy.source, staging, group=group)
    try:
        found = [_largest_difference(policy, pool)]
        noted_update(policy, exported)
        found.append(_largest_difference(policy, pool))
        sync.push(policy.export(), 1)
        return [*found, _largest_difference(policy, pool)]
    finally:
        sync.close()
        if pool is not None:
            pool.close()


def _largest_difference(policy: Policy, pool: EnginePool | None) -> float:
    """Return the largest difference of the log-probabilities of tokens that the engine samples now."""
    batch = policy.mesh.keep_on_lead(lambda: _sampled(pool), Batch.without_rows)
    logp = policy.logprobs(batch)
    return policy.mesh.on_lead(lambda: float(np.abs(logp - batch.logmu)[batch.mask > 0].max()))


def _sampled(pool: EnginePool | None) -> Batch:
    assert pool is not None  # called on rank 0
    sampling = SamplingParams(max_new_tokens=24, ignore_eos=True)
    requests = [GenerationRequest(f"prompt-{number}", prompt, 2, sampling) for number, prompt in enumerate(PROMPTS)]
    found = [(prompt, s) for prompt, group in zip(PROMPTS, pool.generate(requests), strict=True) for s in group]
    columns = {
        "tokens": [np.concatenate([np.array(prompt, np.int32), s.tokens]) for prompt, s in found],
        "mask": [np.repeat(np.float32([0, 1]), [len(prompt), len(s.tokens)]) for prompt, s in found],
        "logmu": [np.concatenate([np.zeros(len(prompt), np.float32), s.columns["logmu"]]) for prompt, s in found],
    }
    count = len(found)
    return Batch(
        ids=np.arange(count),
        groups=np.arange(count) // 2,
        rewards=np.zeros(count, np.float32),
        advantages=np.zeros(count, np.float32),
        cu_seqlens=np.cumsum([0, *(len(tokens) for tokens in columns["tokens"])]),
        **{name: np.concatenate(parts) for name, parts in columns.items()},
    )
