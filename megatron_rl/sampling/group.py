"""From prompts to trajectories: one coroutine per group, numbered for the whole run.

A group begins with one request for n samples. Each sample then goes its own way: it is continued by its tokens after an
abort, and, where an environment answers, turn by turn. Engine tokens are passed on as they came, never tokenized again.
"""

import asyncio
import hashlib
import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_rl.config import RolloutConfig
from megatron_rl.engines.pool import EnginePool, GenerationRequest, Sample, SamplingParams, together
from megatron_rl.errors import EngineError, UserError
from megatron_rl.protocol.generation import RoutedShape
from megatron_rl.sampling.trajectory_builder import Observed, ToolUse, TrajectoryBuilder
from megatron_rl.types import Prompt, Trajectory

Ask = Callable[[GenerationRequest], Awaitable[list[Sample]]]
_BARREN = 3  # aborts in a row without a new token, besides those of weight updates, after which a sample is given up


class Environment(Protocol):
    """What stands between two turns of a response (`tasks.Task` is one). `observe` is called in a thread of its own; last:
    nobody reads what comes back, so nothing is run and there is no text."""

    max_turns: int

    def observe(self, prompt: Prompt, turn: str, *, last: bool) -> Observed: ...


@dataclass(frozen=True)
class GroupSettings:
    """How groups are sampled; alike for all groups of a run, or of one evaluation.

    samples: of each prompt. max_new_tokens: of a response, observations included. environment: None for responses of one
    turn; else `tokenizer` decodes turns and encodes what it says (by one thread at a time: the pool's loop). routed: the
    experts of every token are asked for, too. updates: of the weights that a group may live through; each may abort it, also
    while it waits.
    """

    seed: int
    samples: int
    max_new_tokens: int
    temperature: float
    stop_token_ids: tuple[int, ...]
    need_logmu: bool
    topk: int = 0
    environment: Environment | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    routed: RoutedShape | None = None
    updates: int = 0

    @property
    def turns(self) -> int:
        return 1 if self.environment is None else self.environment.max_turns


@dataclass(frozen=True)
class Group:
    """The trajectories of one prompt. resumed: samples that went on after an abort; retractions: as the engines count;
    tool_use: of all trajectories together."""

    trajectories: list[Trajectory]
    resumed: int = 0
    retractions: int = 0
    tool_use: ToolUse = field(default_factory=ToolUse)

    @property
    def number(self) -> int:
        return self.trajectories[0].group


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
    environment: Environment | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Trajectory]:
    """`samples` (default rollout.samples_per_prompt) trajectories of every prompt, prompt by prompt; waits for all of them.

    Sample k of prompt g has id first_id + g * samples + k and group first_group + g. Everything else as in `sample_group`.
    Raises UserError for a prompt that is empty or longer than rollout.max_prompt_tokens.
    """
    check_prompts(prompts, rollout.max_prompt_tokens)
    settings = GroupSettings(
        seed=seed,
        samples=rollout.samples_per_prompt if samples is None else samples,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature if temperature is None else temperature,
        stop_token_ids=tuple(stop_token_ids),
        need_logmu=need_logmu,
        topk=topk,
        environment=environment,
        tokenizer=tokenizer,
    )

    def group(at: int) -> Coroutine[Any, Any, Group]:
        return sample_group(
            pool.ask, prompts[at], settings, first_id=first_id + at * settings.samples, group=first_group + at
        )

    async def all_groups() -> list[Group]:
        return await together([group(at) for at in range(len(prompts))])

    return [trajectory for group_of in pool.run(all_groups()) for trajectory in group_of.trajectories]


async def sample_group(ask: Ask, prompt: Prompt, settings: GroupSettings, *, first_id: int, group: int) -> Group:
    """The trajectories first_id, first_id + 1, ... of one prompt, for the loop that `ask` belongs to.

    Request names and sampling seeds are pure functions of (seed, trajectory id, number of the sample's request). Response
    tokens are the engine's, a stop token that matched included. topk K > 0: trajectories carry the K likeliest tokens of the
    behavior policy at every position, and logmu.
    Raises EngineError naming the trajectories whose behavior log-probabilities are not finite or that stay aborted.
    """
    samples = await ask(_request(settings, first_id, 0, prompt.tokens, settings.samples, settings.max_new_tokens))
    check_samples(samples, first_id)
    responses = []
    for sample in samples:
        responses.append(TrajectoryBuilder(settings.need_logmu or settings.topk > 0, settings.topk))
        responses[-1].add_sample(sample)
    going = [_go_on(ask, prompt, settings, first_id + k, r) for k, r in enumerate(responses) if _is_open(r, settings)]
    if going:
        await together(going)
    return Group(
        [response.trajectory(first_id + k, group, prompt) for k, response in enumerate(responses)],
        sum(response.resumed for response in responses),
        sum(response.retractions for response in responses),
        ToolUse.total(response.tool_use for response in responses),
    )


def _is_open(response: TrajectoryBuilder, settings: GroupSettings) -> bool:
    return response.finish_reason == "abort" or (response.finish_reason == "stop" and settings.turns > 1)


async def _go_on(ask: Ask, prompt: Prompt, settings: GroupSettings, number: int, response: TrajectoryBuilder) -> None:
    """Take a response from its first sample to its end: again after every abort, and turn by turn."""
    turn, begun, barren, requests = 1, 0, 0 if response.tokens else 1, 1
    while _is_open(response, settings):
        if response.finish_reason == "stop":
            if not await _observe(settings, prompt, response, begun, last=turn == settings.turns):
                return
            turn, begun = turn + 1, len(response.tokens)
        elif barren == _BARREN + settings.updates:
            raise EngineError(f"engines aborted {named([number])} {barren} times in a row: something else aborts them")
        else:
            response.resumed += 1
        left = settings.max_new_tokens - len(response.tokens)
        seen = prompt.tokens + tuple(response.tokens)
        (sample,) = await ask(_request(settings, number, requests, seen, 1, left))
        check_samples([sample], number)
        response.add_sample(sample)
        requests, barren = requests + 1, 0 if sample.tokens else barren + 1


async def _observe(
    settings: GroupSettings, prompt: Prompt, response: TrajectoryBuilder, begun: int, *, last: bool
) -> bool:
    """Hear the environment on the turn that began at position `begun`; whether the model is to write another one.

    What it says ends the response when no token would be left for an answer.
    """
    assert settings.environment is not None and settings.tokenizer is not None
    text = settings.tokenizer.decode(response.tokens[begun:], skip_special_tokens=True)
    observed = await asyncio.to_thread(settings.environment.observe, prompt, text, last=last)
    response.count(observed)
    if observed.void:
        response.leave_out(begun)
    if observed.text is None or last:
        return False
    tokens = settings.tokenizer.encode(observed.text, add_special_tokens=False)
    if len(response.tokens) + len(tokens) >= settings.max_new_tokens:
        response.finish_reason = "length"
        return False
    response.add_observation(tokens)
    return True


def _request(
    settings: GroupSettings, number: int, at: int, tokens: tuple[int, ...], n: int, max_new_tokens: int
) -> GenerationRequest:
    """Request number `at` (from 0) of trajectory `number`, or of the group whose first one that is."""
    sampling = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=settings.temperature,
        stop_token_ids=settings.stop_token_ids,
        seed=sampling_seed(settings.seed, number, at),
    )
    rid = f"s{settings.seed}-t{number}" + (f"-{at}" if at else "")
    logprobs = settings.need_logmu or settings.topk > 0
    return GenerationRequest(rid, tokens, n, sampling, logprobs, settings.topk, routed=settings.routed)


def sampling_seed(seed: int, trajectory: int, request: int = 0) -> int:
    """63 bits, a pure function of the run's seed, the trajectory id and the number of its request."""
    name = f"{seed} {trajectory}" + (f" {request}" if request else "")
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def check_prompts(prompts: Sequence[Prompt], longest: int) -> None:
    """Raises UserError for a prompt without tokens, or with more than `longest`."""
    for prompt in prompts:
        if not prompt.tokens:
            raise UserError(f"prompt '{prompt.id}' has no tokens")
        if len(prompt.tokens) > longest:
            raise UserError(
                f"prompt '{prompt.id}' has {len(prompt.tokens)} tokens, rollout.max_prompt_tokens is {longest}: "
                "raise it or leave the prompt out"
            )


def check_samples(samples: Sequence[Sample], first_id: int) -> None:
    """Raises EngineError naming the trajectories, the first of which is first_id, whose samples nobody can train on."""
    faulty = [(first_id + k, sample.fault) for k, sample in enumerate(samples) if sample.fault]
    if faulty:
        raise EngineError(f"the engine failed on {named([number for number, _ in faulty])}: {faulty[0][1]}")
    broken = [first_id + k for k, sample in enumerate(samples) if not _finite(sample)]
    if broken:
        raise EngineError(
            f"non-finite behavior log-probabilities in {named(broken)}: check the weights the engines serve"
        )


def _finite(sample: Sample) -> bool:
    likeliest = sample.topk is None or bool(np.isfinite(sample.topk.logmu).all())
    return likeliest and (sample.logprobs is None or all(map(math.isfinite, sample.logprobs)))


def named(ids: Sequence[int]) -> str:
    """For a message: the trajectories, or the first eight of them."""
    shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
    return f"trajectory {shown}" if len(ids) == 1 else f"{len(ids)} trajectories ({shown})"
