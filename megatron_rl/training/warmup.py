"""Supervised warm-up: teach a fresh model the task's own solutions until it solves some of them.

Reinforcement learning needs a policy that is right now and then. The loop is the policy's own `update`, with the
negative log-likelihood of the solution in place of an objective.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_rl.config import Config
from megatron_rl.errors import UserError
from megatron_rl.objectives import LossInputs, LossNorm, LossOutputs
from megatron_rl.policy import parallel
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.device import pick_device
from megatron_rl.tasks import make_task
from megatron_rl.training.precision_check import say
from megatron_rl.training.preflight import check_rank
from megatron_rl.training.progress import ProgressLine
from megatron_rl.training.rollouts import stop_token_ids
from megatron_rl.types import Batch, Prompt

NORM = LossNorm("token_mean")


def negative_log_likelihood(inputs: LossInputs) -> LossOutputs:
    """-log p of every trained token, aggregated by the inputs' norm."""
    x = inputs.cleaned()
    return LossOutputs(
        loss=-(x.logp * x.token_weights(inputs.norm or NORM)).sum(), loss_tok=-x.logp, weight_tok=None, metrics={}
    )


def solution_batch(prompts: Sequence[Prompt], solutions: Sequence[str], tokenizer: PreTrainedTokenizerBase, end: int) -> Batch:
    """Prompts followed by their solutions and the end token; solution and end are trained."""
    asked = [p.tokens for p in prompts]
    answers = [(*tokenizer.encode(solution, add_special_tokens=False), end) for solution in solutions]
    lengths = np.array([[len(a), len(b)] for a, b in zip(asked, answers, strict=True)])
    zeros = np.zeros(len(prompts), dtype=np.float32)
    return Batch(
        ids=np.arange(len(prompts)),
        groups=np.arange(len(prompts)),
        tokens=np.concatenate([part for pair in zip(asked, answers, strict=True) for part in pair]).astype(np.int32),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths.sum(1))]),
        mask=np.repeat(np.tile(np.array([0, 1], dtype=np.float32), len(prompts)), lengths.ravel()),
        rewards=zeros,
        advantages=zeros,
    )


def with_a_slip(solution: str, rng: np.random.Generator) -> str:
    """The solution with one of its digits replaced by another digit."""
    places = [i for i, character in enumerate(solution) if character.isdigit()]
    if not places:
        raise UserError(f"solution {solution!r} has no digit to get wrong: warm up with careless 0")
    at = int(rng.choice(places))
    digit = (int(solution[at]) + int(rng.integers(1, 10))) % 10
    return f"{solution[:at]}{digit}{solution[at + 1 :]}"


def expected_pass_rate(policy: Policy, batch: Batch) -> float:
    """Probability that one sample at the rollout temperature is exactly the solution, mean over the batch's problems."""
    logp = policy.logprobs(batch).astype(np.float64)
    return float(np.exp(np.add.reduceat(logp * batch.mask, batch.cu_seqlens[:-1])).mean())


def warm_up(
    config: Config, dest: Path, *, target: float, careless: float, batch_size: int, max_updates: int, check_every: int = 10
) -> float:
    """Train `config.model.path` on solutions until the held-out pass rate reaches `target`; write it to `dest`.

    careless: share of demonstrations with one wrong digit. Such a teacher shows the way and cannot be trusted: what is
    left to learn is there for the verifier to reward. Collective over the ranks of `config.parallel`; answers the pass
    rate reached. Raises UserError when `max_updates` do not get there, PrecisionError for a plan that cannot run here.
    """
    report = check_rank(config)
    device = pick_device(config.run.device)
    if device.type == "cpu" and config.parallel.world_size > 1:
        torch.set_num_threads(1)
    mesh = parallel.initialize(config.parallel, device, config.run.seed)
    if mesh.rank == 0:
        say(report)
    policy = Policy(config, mesh)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    task = make_task(config.task, tokenizer, seed=config.run.seed, max_prompt_tokens=config.rollout.max_prompt_tokens)
    end = stop_token_ids(config.model.path)[0]
    rng = np.random.default_rng(config.run.seed)
    right = [task.solution(p) for p in task.train]
    wrong = [with_a_slip(solution, rng) for solution in right] if careless else right
    problems = len(right)
    everything = solution_batch([*task.train, *task.train], [*right, *wrong], tokenizer, end)
    held_out = solution_batch(task.held_out, [task.solution(p) for p in task.held_out], tokenizer, end)
    rate = 0.0
    with ProgressLine("warm-up", max_updates, 0, enabled=mesh.rank == 0) as progress:
        for update in range(1, max_updates + 1):
            rows = rng.choice(problems, min(batch_size, problems), replace=False)
            rows += problems * (rng.random(len(rows)) < careless)
            stats = policy.update(everything.select(rows), negative_log_likelihood, NORM)
            if update % check_every == 0:
                rate = expected_pass_rate(policy, held_out)
                progress.show(f"loss {stats.loss:.3f} | held-out pass rate {rate:.1%}", update)
                if rate >= target:
                    break
    if rate < target:
        raise UserError(f"warm-up reached a pass rate of {rate:.1%} in {max_updates} updates, {target:.1%} was asked for")
    policy.save_hf(dest)
    parallel.shutdown()
    return rate
