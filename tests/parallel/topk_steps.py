"""Functions that the ranks of a group run to train with the engine's top-k tokens and a reference policy.

The common arguments are described in `tests.parallel.steps`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_rl.errors import UserError
from megatron_rl.objectives import LossInputs, LossNorm, LossOutputs, make_objective
from megatron_rl.policy.actor import Policy
from megatron_rl.types import Batch
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.hf_model import check_folder
from tests.parallel.steps import BUDGET, exported, make_batch, make_policy

NORM = LossNorm("token_mean")


def topk_batch(k: int = 4, vocab: int = 259) -> Batch:
    """Return the batch of `steps` with rewards, advantages per token and top-k tokens of a simulated engine."""
    batch, rng = make_batch(vocab), np.random.default_rng(7)
    shape = (len(batch.tokens), k)
    ids = rng.permuted(np.tile(np.arange(vocab, dtype=np.int32), (shape[0], 1)), axis=1)[:, :k]
    keep = batch.mask[:, None]
    return batch.with_columns(
        rewards=rng.standard_normal(len(batch)).astype(np.float32),
        token_advantages=(rng.standard_normal(shape[0]) * batch.mask).astype(np.float32),
        topk_ids=(ids * keep).astype(np.int32),
        topk_logmu=(rng.uniform(-7, -4, shape) * keep).astype(np.float32),
    )


def shift(logp_K: torch.Tensor, logmu_K: torch.Tensor) -> torch.Tensor:
    """Return the mean distance between the policy and the engine on these tokens, [..., K] -> [...]."""
    return (logp_K - logmu_K).abs().mean(-1)


def reads_topk(x: LossInputs) -> LossOutputs:
    """Return the loss -A logp, weighted with reward and shift.

    The weight is not detached, so the gradient is right only if the top-k scores are constants.
    """
    assert x.topk is not None and x.rewards is not None and x.norm is not None and x.norm.tokens is not None
    moved = shift(*x.topk)
    loss_tok = -x.advantages * x.logp * (1 + x.rewards.square()) * moved * x.mask
    metrics = {
        "shift": (moved * x.mask).detach().sum() / x.norm.tokens,
        "attached": torch.tensor(float(x.topk[0].requires_grad)),
    }
    return LossOutputs(loss=loss_tok.sum() / x.norm.tokens, loss_tok=loss_tok, weight_tok=None, metrics=metrics)


def step(model: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """Make one update with `reads_topk`. Return its stats and, on rank 0, the weights after it."""
    policy = make_policy(model, layout)
    stats = policy.update(topk_batch(), reads_topk, NORM)
    return {"loss": stats.loss, "metrics": stats.metrics, "grad_norm": stats.grad_norm, "weights": exported(policy)}


CENTERED = {"name": "naive", "score_centering": {"mode": "tis", "top_k": 4, "low": 0.5, "high": 1.5}}


def centered_step(model: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """Make one update with score centering, whose gradient goes through the top-k tokens."""
    policy = make_policy(model, layout)
    batch = topk_batch()
    stats = policy.update(batch.with_columns(logmu=-batch.mask), make_objective(CENTERED), NORM)
    return {"loss": stats.loss, "metrics": stats.metrics, "grad_norm": stats.grad_norm}


def _bits(policy: Policy) -> list[torch.Tensor]:
    return [p.data.clone() for model in policy.models for p in model.parameters()]


def _places(policy: Policy) -> list[int]:
    return [p.data_ptr() for model in policy.models for p in model.parameters()]


def reference(model: Path, layout: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """Train, score with the reference policy, raise an error while doing so, and train again."""
    batch = topk_batch()
    plain = make_policy(model, layout, **sections)
    for _ in range(2):
        plain.update(batch, reads_topk, NORM)
    expected = _bits(plain)

    policy = make_policy(model, layout, **sections)
    try:
        policy.reference_logprobs(batch)
        unkept = ""
    except UserError as error:
        unkept = str(error)
    before = policy.logprobs(batch)
    policy.keep_reference()
    policy.update(batch, reads_topk, NORM)
    bits, places, after = _bits(policy), _places(policy), policy.logprobs(batch)
    found = [policy.reference_logprobs(batch) for _ in range(2)]
    same = [all(map(torch.equal, bits, _bits(policy)))]
    first = batch.select(np.array([0]))
    too_long = Batch(
        cu_seqlens=np.array([0, BUDGET + 1]),
        tokens=np.zeros(BUDGET + 1, dtype=np.int32),
        mask=np.ones(BUDGET + 1, dtype=np.float32),
        **{name: getattr(first, name) for name in ("ids", "groups", "rewards", "advantages")},
    )
    try:
        policy.reference_logprobs(too_long)
        refused = ""
    except UserError as error:
        refused = str(error)
    same.append(all(map(torch.equal, bits, _bits(policy))))
    asked_again = policy.reference_logprobs(batch)
    policy.update(batch, reads_topk, NORM)
    return {
        "unkept": unkept,
        "refused": refused,
        "before": before,
        "after": after,
        "found": [*found, asked_again],
        "same_bits": same,
        "same_places": places == _places(policy),
        "same_training": all(map(torch.equal, expected, _bits(policy))),
    }


def taught(model: Path, teacher: Path, layout: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """Keep another folder as the reference, then distill from it, and from the policy itself."""
    batch = make_batch()
    policy = make_policy(model, layout, **sections)
    bits, places = _bits(policy), _places(policy)
    policy.keep_reference(check_folder(HFFolder(teacher), tensor_parallel=layout.get("tensor", 1)))
    untouched = all(map(torch.equal, bits, _bits(policy))) and places == _places(policy)
    own, logref = policy.logprobs(batch), policy.reference_logprobs(batch)
    objective = make_objective({"name": "opd"})
    itself = policy.update(batch.with_columns(logref=own), objective, NORM)
    stats = policy.update(batch.with_columns(logref=logref), objective, NORM)
    return {
        "untouched": untouched,
        "own": own,
        "logref": logref,
        "itself": itself.grad_norm,
        "loss": stats.loss,
        "metrics": stats.metrics,
        "grad_norm": stats.grad_norm,
    }
