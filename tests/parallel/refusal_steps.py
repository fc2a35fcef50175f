"""Functions that the ranks of a group run to make a non-finite update and to check the state after it.

The common arguments are described in `tests.parallel.steps`.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.errors import MegatronRLError
from megatron_rl.objectives import make_objective
from megatron_rl.policy.actor import Policy
from megatron_rl.types import Batch
from tests.parallel.steps import OBJECTIVE, exported, make_batch, make_policy

MARK = 258  # a token that only the marked trajectory contains
MARKED = 6


def batch_with_a_marked_trajectory() -> Batch:
    """Return the usual batch. Token MARK is the first one of trajectory MARKED and occurs nowhere else."""
    batch = make_batch()
    tokens = batch.tokens.copy()
    tokens[tokens == MARK] = 0
    tokens[batch.cu_seqlens[MARKED]] = MARK
    return batch.with_columns(tokens=tokens)


def digest(policy: Policy) -> str:
    """Return the digest of all bytes of parameters and optimizer state on this rank."""
    found = hashlib.sha256()
    for chunk in policy.models:
        for name, parameter in chunk.named_parameters():
            found.update(name.encode() + parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    for part in policy.optimizer.core.chained_optimizers:
        for state in part.optimizer.state.values():
            for key in sorted(state):
                found.update(
                    key.encode() + torch.as_tensor(state[key]).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                )
    found.update(str(policy.optimizer.updates).encode())
    return found.hexdigest()


def _poisoned(policy: Policy, kind: str) -> Tensor | None:
    """Return the values to poison, as a view of a parameter, or None on ranks that do not hold it."""
    for chunk in policy.models:
        for name, parameter in chunk.named_parameters():
            if kind == "last_stage" and name == "decoder.final_layernorm.weight":
                return parameter.data[3:4]
            if kind == "embedding" and name == "embedding.word_embeddings.weight":
                return parameter.data[MARK]
    return None


def refused_update(
    model: Path, layout: dict[str, Any], kind: str, value: float, only_rank: int | None = None
) -> dict[str, Any]:
    """Make a good update, try an update and scoring with a poisoned parameter, and make the good update again.

    Args:
        model: as in `tests.parallel.steps`.
        layout: as in `tests.parallel.steps`.
        kind: the parameter to poison, `last_stage` or `embedding`.
        value: the value to write.
        only_rank: poison only the replica on this rank, as broken memory would.
    """
    policy, objective, batch = make_policy(model, layout), make_objective(OBJECTIVE), batch_with_a_marked_trajectory()
    policy.update(batch, objective, objective.norm)
    spoiled = _poisoned(policy, kind) if only_rank in (None, policy.mesh.rank) else None
    right = None if spoiled is None else spoiled.clone()
    if spoiled is not None:
        spoiled.fill_(value)
    before, errors = digest(policy), []
    for attempt in (lambda: policy.update(batch, objective, objective.norm), lambda: policy.logprobs(batch)):
        try:
            attempt()
            errors.append("none")
        except MegatronRLError as error:
            errors.append(f"{type(error).__name__}: {error}")
    after = digest(policy)
    if spoiled is not None and right is not None:
        spoiled.copy_(right)
    stats = policy.update(batch, objective, objective.norm)
    return {"errors": errors, "untouched": before == after, "loss": stats.loss, "weights": exported(policy)}


def two_updates(model: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """Make the same two good updates with nothing in between."""
    policy, objective, batch = make_policy(model, layout), make_objective(OBJECTIVE), batch_with_a_marked_trajectory()
    policy.update(batch, objective, objective.norm)
    before = digest(policy)
    stats = policy.update(batch, objective, objective.norm)
    return {"moved": before != digest(policy), "loss": stats.loss, "weights": exported(policy)}


def overflowing_gradient(model: Path, layout: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """Make an update with a finite loss and a non-finite gradient."""
    policy, objective = make_policy(model, layout, **sections), make_objective(OBJECTIVE)
    batch = make_batch()
    policy.update(batch, objective, objective.norm)
    before = digest(policy)

    def steep(inputs: Any) -> Any:
        out = objective(inputs)
        kept = inputs.logp[inputs.mask > 0]
        return replace(out, loss=out.loss + ((kept - kept.detach()) * 1e38).sum() * 1e3)

    try:
        policy.update(batch, steep, objective.norm)
        error = "none"
    except MegatronRLError as refused:
        error = f"{type(refused).__name__}: {refused}"
    return {"error": error, "untouched": before == digest(policy)}


def update_with_scale(model: Path, layout: dict[str, Any], scale: float, **sections: Any) -> dict[str, Any]:
    """Make a float16 update that starts with loss scale `scale`. Return its norm, digest and final loss scale."""
    policy, objective = make_policy(model, layout, precision={"train": "fp16"}, **sections), make_objective(OBJECTIVE)
    scaler = policy.optimizer.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": torch.tensor([scale])})
    before, stats = digest(policy), policy.update(make_batch(), objective, objective.norm)
    after = digest(policy)
    return {"norm": stats.grad_norm, "digest": after, "moved": before != after, "scale": float(scaler.scale)}
