"""From prompts to trajectories: one request per prompt, n samples each, numbered for the whole run."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from megatron_rl.config import RolloutConfig
from megatron_rl.errors import EngineError, UserError
from megatron_rl.rollout.client import EnginePool, GenerationRequest, Sample, SamplingParams
from megatron_rl.types import Prompt, Trajectory

_ROUNDS = 3


def sample_groups(
    pool: EnginePool,
    prompts: Sequence[Prompt],
    rollout: RolloutConfig,
    *,
    first_id: int,
    first_group: int,
    seed: int,
    stop_token_ids: Sequence[int],
    need_logmu: bool,
    temperature: float | None = None,
    samples: int | None = None,
    topk: int = 0,
) -> list[Trajectory]:
    """`samples` (default rollout.samples_per_prompt) trajectories of every prompt, prompt by prompt.

    Sample k of prompt g has id first_id + g * samples + k and group first_group + g. Request names and sampling
    seeds are pure functions of (seed, trajectory id). Response tokens are the engine's, a stop token that
    matched included. A group with an aborted sample is asked for again. topk K > 0: trajectories carry the K likeliest
    tokens of the behaviour policy at every position, and logmu.
    Raises UserError for a prompt that is empty or longer than rollout.max_prompt_tokens, EngineError naming the
    trajectories whose behaviour log-probabilities are not finite or that stay aborted.
    """
    n = rollout.samples_per_prompt if samples is None else samples
    _check_prompts(prompts, rollout.max_prompt_tokens)
    heat = rollout.temperature if temperature is None else temperature

    def request(group: int, attempt: int) -> GenerationRequest:
        first = first_id + group * n
        sampling = SamplingParams(
            max_new_tokens=rollout.max_new_tokens,
            temperature=heat,
            stop_token_ids=tuple(stop_token_ids),
            seed=sampling_seed(seed, first),
        )
        rid = f"s{seed}-t{first}" + (f"-again{attempt}" if attempt else "")
        return GenerationRequest(rid, prompts[group].tokens, n, sampling, need_logmu or topk > 0, topk)

    answers = pool.generate([request(group, 0) for group in range(len(prompts))])
    for attempt in range(1, _ROUNDS + 1):
        _check_samples(answers, first_id, n)
        aborted = [group for group, samples_of in enumerate(answers) if any(s.finish_reason == "abort" for s in samples_of)]
        if not aborted:
            return _trajectories(prompts, answers, first_id, first_group, n)
        if attempt < _ROUNDS:
            for group, redone in zip(aborted, pool.generate([request(group, attempt) for group in aborted]), strict=True):
                answers[group] = redone
    ids = [first_id + group * n + k for group in aborted for k in range(n) if answers[group][k].finish_reason == "abort"]
    raise EngineError(f"engines aborted {_named(ids)} in {_ROUNDS} rounds: something else pauses or aborts them")


def sampling_seed(seed: int, trajectory: int) -> int:
    """63 bits, a pure function of the run's seed and the trajectory id."""
    digest = hashlib.blake2b(f"{seed} {trajectory}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _check_prompts(prompts: Sequence[Prompt], longest: int) -> None:
    for prompt in prompts:
        if not prompt.tokens:
            raise UserError(f"prompt '{prompt.id}' has no tokens")
        if len(prompt.tokens) > longest:
            raise UserError(
                f"prompt '{prompt.id}' has {len(prompt.tokens)} tokens, rollout.max_prompt_tokens is {longest}: "
                "raise it or leave the prompt out"
            )


def _check_samples(answers: list[list[Sample]], first_id: int, n: int) -> None:
    numbered = [(first_id + group * n + k, sample) for group, row in enumerate(answers) for k, sample in enumerate(row)]
    faulty = [(number, sample.fault) for number, sample in numbered if sample.fault]
    if faulty:
        raise EngineError(f"the engine failed on {_named([number for number, _ in faulty])}: {faulty[0][1]}")
    broken = [number for number, sample in numbered if not _finite(sample)]
    if broken:
        raise EngineError(f"non-finite behaviour log-probabilities in {_named(broken)}: check the weights the engines serve")


def _finite(sample: Sample) -> bool:
    likeliest = sample.topk is None or bool(np.isfinite(sample.topk.logmu).all())
    return likeliest and (sample.logprobs is None or all(map(math.isfinite, sample.logprobs)))


def _trajectories(
    prompts: Sequence[Prompt], answers: list[list[Sample]], first_id: int, first_group: int, n: int
) -> list[Trajectory]:
    return [
        Trajectory(
            id=first_id + group * n + k,
            group=first_group + group,
            prompt_id=prompt.id,
            prompt_tokens=prompt.tokens,
            response_tokens=sample.tokens,
            logmu=sample.logprobs,
            finish_reason=sample.finish_reason,
            versions=sample.versions,
            topk=sample.topk,
        )
        for group, (prompt, samples_of) in enumerate(zip(prompts, answers, strict=True))
        for k, sample in enumerate(samples_of)
    ]


def _named(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
    return f"trajectory {shown}" if len(ids) == 1 else f"{len(ids)} trajectories ({shown})"
