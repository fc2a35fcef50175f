"""Supervised warm-up: teach a fresh model the task's own solutions until it solves some of them.

Reinforcement learning needs a policy that is right now and then. The loop is the policy's own `update`, with the
negative log-likelihood of the solution in place of an objective.
"""

from collections.abc import Sequence

import numpy as np
from transformers import AutoTokenizer

from megatron_rl.config import Config
from megatron_rl.objectives import LossInputs, LossNorm, LossOutputs
from megatron_rl.policy import parallel
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.device import pick_device
from megatron_rl.tasks import Task, make_task
from megatron_rl.training.rollouts import stop_token_ids
from megatron_rl.types import Batch, Prompt

NORM = LossNorm("token_mean")


def negative_log_likelihood(inputs: LossInputs) -> LossOutputs:
    """-log p of every trained token, aggregated by the inputs' norm."""
    x = inputs.cleaned()
    return LossOutputs(loss=-(x.logp * x.token_weights(inputs.norm or NORM)).sum(), loss_tok=-x.logp, weight_tok=None, metrics={})


def solution_batch(task: Task, prompts: Sequence[Prompt], tokenizer, eos: int) -> Batch:
    """Prompts followed by their solutions and the end token; solution and end are trained."""
    answers = [(*tokenizer.encode(task.solution(p), add_special_tokens=False), eos) for p in prompts]
    lengths = np.array([len(p.tokens) + len(a) for p, a in zip(prompts, answers, strict=True)])
    return Batch(
        ids=np.arange(len(prompts)),
        groups=np.arange(len(prompts)),
        tokens=np.concatenate([np.asarray(p.tokens + a, dtype=np.int32) for p, a in zip(prompts, answers, strict=True)]),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]),
        mask=np.concatenate([[0.0] * len(p.tokens) + [1.0] * len(a) for p, a in zip(prompts, answers, strict=True)]).astype(
            np.float32
        ),
        rewards=np.zeros(len(prompts), dtype=np.float32),
        advantages=np.zeros(len(prompts), dtype=np.float32),
    )


def expected_pass_rate(policy: Policy, batch: Batch) -> float:
    """Probability that one sample at the rollout temperature is exactly the solution, mean over the batch's problems."""
    logp = policy.logprobs(batch).astype(np.float64)
    return float(np.exp(np.add.reduceat(logp * batch.mask, batch.cu_seqlens[:-1])).mean())
