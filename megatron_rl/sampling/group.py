"""Sampling of groups: one coroutine samples the trajectories of one prompt. Groups are numbered over the whole run.

A group starts with one request for n samples. After that, each sample continues on its own. After an abort, it is
resumed from its tokens. With an environment, it continues turn by turn. The engine's tokens are passed on unchanged and
are never tokenized again.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_rl.config import RolloutConfig
from megatron_rl.engines.pool import EnginePool, GenerationRequest, Sample, SamplingParams, together
from megatron_rl.errors import EngineError, UserError
from megatron_rl.protocol.generation import RoutedShape
from megatron_rl.sampling.trajectory_builder import Observed, ToolUse, TrajectoryBuilder
from megatron_rl.tasks.end_tokens import decode_turns
from megatron_rl.types import COLUMNS, Prompt, TokenIds, Trajectory

Ask = Callable[[GenerationRequest], Awaitable[list[Sample]]]
# Aborts in a row without a new token, in addition to one per weight update, after which an error is raised.
_BARREN = 3


class Environment(Protocol):
    """The environment between two turns of a response. `tasks.Task` is one.

    Attributes:
        max_turns: most turns of the model in one response.
    """

    max_turns: int

    def observe(self, prompt: Prompt, turn: str, *, last: bool) -> Observed:
        """Return the observation of one turn. Called in its own thread.

        Args:
            prompt: the prompt of the response.
            turn: the decoded text of the turn.
            last: True if the observation is not used. Then nothing is run, and there is no text.
        """
        ...


@dataclass(frozen=True)
class GroupSettings:
    """How groups are sampled; the same for all groups of a run, or of one evaluation.

    Attributes:
        seed: seed of the run or evaluation.
        samples: number of samples of each prompt.
        max_new_tokens: limit of tokens in a response, observations included.
        temperature: sampling temperature; 0 is greedy.
        stop_token_ids: tokens that end a turn.
        need_logmu: request the log-probabilities of the behavior policy.
        topk: request the K most likely tokens at every position; 0 for none.
        environment: None for responses of one turn.
        tokenizer: decodes turns and encodes observations, if there is an environment. Only one thread may use it at a
            time: that of the pool's loop.
        routed: also request the experts of every token, in this shape; None: do not request them.
        updates: most weight updates while one group is sampled. Each update may abort the group, also while it waits.
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
        """Most turns of the model in one response; 1 without an environment."""
        return 1 if self.environment is None else self.environment.max_turns


@dataclass(frozen=True)
class Group:
    """The trajectories of one prompt.

    Attributes:
        trajectories: all trajectories of the group, in order of their ids.
        resumed: how often a sample was resumed after an abort.
        retractions: retractions as the engines count them.
        tool_use: sum over all trajectories.
        reward_metrics: what the reward of each trajectory reports besides its number; empty if it reports nothing.
        reward_errors: number of trajectories whose reward failed and counts as 0.
    """

    trajectories: list[Trajectory]
    resumed: int = 0
    retractions: int = 0
    tool_use: ToolUse = field(default_factory=ToolUse)
    reward_metrics: tuple[Mapping[str, float], ...] = ()
    reward_errors: int = 0

    @property
    def number(self) -> int:
        """The number of the group, which all its trajectories share."""
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
    """Return the trajectories of every prompt, prompt by prompt. Waits for all of them.

    Sample k of prompt g has id first_id + g * samples + k and group first_group + g. For seeds, request ids and errors,
    see `sample_group`.

    Args:
        pool: the engines that generate.
        prompts: the prompts to sample.
        rollout: the `rollout` section, from which defaults and limits are taken.
        first_id: id of the first trajectory.
        first_group: number of the first group.
        seed: seed of the run or evaluation.
        stop_token_ids: tokens that end a turn.
        need_logmu: request the log-probabilities of the behavior policy.
        temperature: None: rollout.temperature.
        samples: trajectories of each prompt. None: rollout.samples_per_prompt.
        topk: request the K most likely tokens at every position; 0 for none.
        environment: None for responses of one turn.
        tokenizer: decodes turns and encodes observations, if there is an environment.

    Raises:
        UserError: a prompt is empty or longer than rollout.max_prompt_tokens.
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
            pool.sample, prompts[at], settings, first_id=first_id + at * settings.samples, group=first_group + at
        )

    async def all_groups() -> list[Group]:
        return await together([group(at) for at in range(len(prompts))])

    return [trajectory for group_of in pool.run(all_groups()) for trajectory in group_of.trajectories]


async def sample_group(ask: Ask, prompt: Prompt, settings: GroupSettings, *, first_id: int, group: int) -> Group:
    """Return the group of one prompt, with trajectories first_id, first_id + 1, ...

    Runs in the loop that `ask` belongs to. Request ids and sampling seeds are pure functions of (seed, trajectory id,
    number of the sample's request). Response tokens are the engine's, including a stop token that matched. If topk is K
    > 0, trajectories have the columns logmu, topk_ids and topk_logmu.

    Args:
        ask: sends one request to an engine and returns its samples.
        prompt: the prompt to sample.
        settings: how to sample.
        first_id: id of the first trajectory.
        group: number of the group.

    Raises:
        EngineError: an engine failed, behavior log-probabilities are not finite, or a sample is aborted again and
            again. The message names the trajectories.
    """
    samples = await ask(_request(settings, first_id, 0, prompt.tokens, settings.samples, settings.max_new_tokens))
    check_samples(samples, first_id)
    responses = [TrajectoryBuilder(sample) for sample in samples]
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
    """Complete a response after its first sample: resume it after every abort, and continue it turn by turn."""
    turn, begun, barren, requests = 1, 0, 0 if response.length else 1, 1
    while _is_open(response, settings):
        if response.finish_reason == "stop":
            if not await _observe(settings, prompt, response, begun, last=turn == settings.turns):
                return
            turn, begun = turn + 1, response.length
        elif barren == _BARREN + settings.updates:
            raise EngineError(
                f"engines aborted {trajectory_names([number])} {barren} times in a row: something else aborts them"
            )
        else:
            response.resumed += 1
        left = settings.max_new_tokens - response.length
        seen = np.concatenate([np.array(prompt.tokens, np.int32), response.tokens()])
        (sample,) = await ask(_request(settings, number, requests, seen, 1, left))
        check_samples([sample], number)
        response.add_sample(sample)
        requests, barren = requests + 1, 0 if len(sample.tokens) else barren + 1


async def _observe(
    settings: GroupSettings, prompt: Prompt, response: TrajectoryBuilder, begun: int, *, last: bool
) -> bool:
    """Send the finished turn to the environment. Return True if the model should generate another turn.

    The turn starts at token position `begun`. If the observation leaves no token for another turn, the response ends.
    """
    assert settings.environment is not None and settings.tokenizer is not None
    (text,) = decode_turns(settings.tokenizer, [response.tokens(begun)], settings.stop_token_ids)
    observed = await asyncio.to_thread(settings.environment.observe, prompt, text, last=last)
    response.count(observed)
    if observed.void:
        response.leave_out(begun)
    if observed.text is None or last:
        return False
    tokens = settings.tokenizer.encode(observed.text, add_special_tokens=False)
    if response.length + len(tokens) >= settings.max_new_tokens:
        response.finish_reason = "length"
        return False
    response.add_observation(tokens)
    return True


def _request(
    settings: GroupSettings, number: int, at: int, tokens: TokenIds, n: int, max_new_tokens: int
) -> GenerationRequest:
    """Return request number `at` (from 0) of trajectory `number`, or of the group whose first trajectory it is."""
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
    """Return a seed of 63 bits, a pure function of the arguments.

    Args:
        seed: the run's seed.
        trajectory: id of the trajectory.
        request: number of the request among those of the trajectory, from 0.
    """
    name = f"{seed} {trajectory}" + (f" {request}" if request else "")
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def check_prompts(prompts: Sequence[Prompt], longest: int) -> None:
    """Raise UserError if a prompt has no tokens, or more than `longest`."""
    for prompt in prompts:
        if not prompt.tokens:
            raise UserError(f"prompt '{prompt.id}' has no tokens")
        if len(prompt.tokens) > longest:
            raise UserError(
                f"prompt '{prompt.id}' has {len(prompt.tokens)} tokens, rollout.max_prompt_tokens is {longest}: "
                "raise it or leave the prompt out"
            )


def check_samples(samples: Sequence[Sample], first_id: int) -> None:
    """Raise EngineError if samples cannot be trained on.

    The message names their trajectories; the first sample belongs to trajectory first_id.
    """
    faulty = [(first_id + k, sample.fault) for k, sample in enumerate(samples) if sample.fault]
    if faulty:
        raise EngineError(f"the engine failed on {trajectory_names([number for number, _ in faulty])}: {faulty[0][1]}")
    broken = [first_id + k for k, sample in enumerate(samples) if not _finite(sample)]
    if broken:
        raise EngineError(
            f"non-finite behavior log-probabilities in {trajectory_names(broken)}: check the weights the engines serve"
        )


def _finite(sample: Sample) -> bool:
    return all(np.isfinite(values).all() for name, values in sample.columns.items() if COLUMNS[name].finite)


def trajectory_names(ids: Sequence[int]) -> str:
    """Return the trajectory ids as text for an error message, or the first eight of them."""
    shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
    return f"trajectory {shown}" if len(ids) == 1 else f"{len(ids)} trajectories ({shown})"
