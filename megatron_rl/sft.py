"""Supervised warm-up: train a fresh model on the task's own solutions until it solves some of them.

Reinforcement learning needs a policy that is sometimes right. The loop calls the policy's own `update`, with the
negative log-likelihood of the solution in place of an objective.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_rl.config import Config
from megatron_rl.errors import UserError
from megatron_rl.objectives import LossInputs, LossNorm, LossOutputs
from megatron_rl.plan import print_plan
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.build import build_policy
from megatron_rl.policy.parallel import joined_mesh
from megatron_rl.tasks import make_task
from megatron_rl.tasks.end_tokens import turn_end_id
from megatron_rl.tasks.task import Turn
from megatron_rl.tasks.templates import load_tokenizer
from megatron_rl.trainer.preflight import resolve_on_rank
from megatron_rl.trainer.progress import ProgressLine
from megatron_rl.types import Batch, Prompt

NORM = LossNorm("token_mean")


def negative_log_likelihood(inputs: LossInputs) -> LossOutputs:
    """Return the loss -logp of every trained token, aggregated by the inputs' norm."""
    x = inputs.cleaned()
    return LossOutputs(
        loss=-(x.logp * x.token_weights(inputs.norm or NORM)).sum(), loss_tok=-x.logp, weight_tok=None, metrics={}
    )


def solution_batch(
    prompts: Sequence[Prompt], solutions: Sequence[Sequence[Turn]], tokenizer: PreTrainedTokenizerBase, end: int
) -> Batch:
    """Return a batch of prompts, each followed by the turns of its solution. The end token follows each turn.

    Turns and end tokens are trained. Environment output after a turn is not.

    Args:
        prompts: the prompts of the batch.
        solutions: turns of the solution of each prompt.
        tokenizer: encodes turns and environment output.
        end: id of the end token.
    """

    def encoded(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    parts: list[list[tuple[Sequence[int], int]]] = []  # per trajectory: tokens, and whether they are trained
    for prompt, turns in zip(prompts, solutions, strict=True):
        parts.append([(prompt.tokens, 0)])
        for turn in turns:
            parts[-1] += [([*encoded(turn.text), end], 1), (encoded(turn.observation or ""), 0)]
    lengths = [sum(len(tokens) for tokens, _ in row) for row in parts]
    zeros = np.zeros(len(prompts), dtype=np.float32)
    return Batch(
        ids=np.arange(len(prompts)),
        groups=np.arange(len(prompts)),
        tokens=np.concatenate([np.asarray(tokens, dtype=np.int32) for row in parts for tokens, _ in row]),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]),
        mask=np.concatenate(
            [np.full(len(tokens), trained, dtype=np.float32) for row in parts for tokens, trained in row]
        ),
        rewards=zeros,
        advantages=zeros,
    )


def with_wrong_digit(solution: Sequence[Turn], rng: np.random.Generator) -> list[Turn]:
    """Return the solution with one digit of its last turn replaced by another. Raises UserError if it has no digit."""
    *before, last = solution
    return [*before, replace(last, text=_with_wrong_digit(last.text, rng))]


def _with_wrong_digit(solution: str, rng: np.random.Generator) -> str:
    places = [i for i, character in enumerate(solution) if character.isdigit()]
    if not places:
        raise UserError(f"solution {solution!r} has no digit to get wrong: warm up with error_rate 0")
    at = int(rng.choice(places))
    digit = (int(solution[at]) + int(rng.integers(1, 10))) % 10
    return f"{solution[:at]}{digit}{solution[at + 1 :]}"


def expected_pass_rate(policy: Policy, batch: Batch) -> float:
    """Return the probability that a sample at the rollout temperature is the solution, mean over the problems.

    Collective; every rank gets it.
    """
    logp = np.asarray(policy.mesh.broadcast(policy.logprobs(batch)), dtype=np.float64)
    return float(np.exp(np.add.reduceat(logp * batch.mask, batch.cu_seqlens[:-1])).mean())


def warm_up(
    config: Config,
    dest: Path,
    *,
    target: float,
    error_rate: float,
    batch_size: int,
    max_updates: int,
    check_every: int = 10,
) -> float:
    """Train `config.model.path` on solutions until the held-out pass rate reaches `target`. Collective.

    Args:
        config: the resolved configuration.
        dest: Hugging Face folder to write.
        target: held-out pass rate at which to stop.
        error_rate: share of demonstrations with one wrong digit. From these the model learns the form of a solution,
            and the verifier's reward can still improve it.
        batch_size: number of problems per update.
        max_updates: number of updates after which to fail.
        check_every: updates between measurements of the pass rate.

    Returns:
        The pass rate reached.

    Raises:
        UserError: if `max_updates` updates do not reach the target.
        PrecisionError: if this machine does not support the precision plan.
    """
    plan = resolve_on_rank(config)
    with joined_mesh(config) as mesh:
        if mesh.rank == 0:
            print_plan(plan, config)
        policy = build_policy(config, mesh, plan.precision, plan.noise)
        tokenizer = load_tokenizer(config.model.path)
        task = make_task(
            config.task, tokenizer, seed=config.run.seed, max_prompt_tokens=config.rollout.max_prompt_tokens
        )
        end = turn_end_id(config.model.path, tokenizer)
        rng = np.random.default_rng(config.run.seed)
        right = [task.demonstration(p) for p in task.train]
        wrong = [with_wrong_digit(solution, rng) for solution in right] if error_rate else right
        everything = solution_batch([*task.train, *task.train], [*right, *wrong], tokenizer, end)
        held_out = solution_batch(task.held_out, [task.demonstration(p) for p in task.held_out], tokenizer, end)
        rate = 0.0
        with ProgressLine("warm-up", max_updates, 0, enabled=mesh.rank == 0) as progress:
            for update in range(1, max_updates + 1):
                rows = rng.choice(len(right), min(batch_size, len(right)), replace=False)
                rows += len(right) * (rng.random(len(rows)) < error_rate)
                stats = policy.update(everything.select(rows), negative_log_likelihood, NORM)
                if update % check_every == 0:
                    rate = expected_pass_rate(policy, held_out)
                    progress.show(f"loss {stats.loss:.3f} | held-out pass rate {rate:.1%}", update)
                    if rate >= target:
                        break
        if rate < target:
            raise UserError(
                f"warm-up reached a pass rate of {rate:.1%} in {max_updates} updates, {target:.1%} was asked for"
            )
        policy.save_hf(dest)
    return rate
