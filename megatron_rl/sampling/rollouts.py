"""Rank 0's part of a step: draw prompts, collect verified trajectories, and make one batch for all ranks."""

import copy
import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_rl.config import Config
from megatron_rl.config.code_paths import code_digests
from megatron_rl.diagnostics.evaluations import Evaluation
from megatron_rl.diagnostics.samples import ShownSample
from megatron_rl.engines.pool import EnginePool
from megatron_rl.errors import ConfigError
from megatron_rl.policy.checkpoint_files import PARTIAL
from megatron_rl.policy.checkpoint_state import TrainState, newest_valid
from megatron_rl.protocol.generation import RoutedShape
from megatron_rl.sampling.batch import make_batch
from megatron_rl.sampling.group import Group, GroupSettings, sample_groups
from megatron_rl.sampling.journal import GroupJournal
from megatron_rl.sampling.scheduler import Bounds, Scheduler, Source
from megatron_rl.sampling.shown_samples import Kept, decode_samples, keep_samples
from megatron_rl.sampling.step_groups import PromptDraws
from megatron_rl.tasks import Task, prompts_for_step
from megatron_rl.tasks.end_tokens import decode_turns, stop_token_ids
from megatron_rl.tasks.make_reward import make_reward
from megatron_rl.tasks.reward import Response, Score
from megatron_rl.types import Batch, Prompt, Trajectory
from megatron_rl.weights.families import read_family
from megatron_rl.weights.hf_folder import HFFolder

_EVALUATED_TOGETHER = 8  # prompts whose responses are verified at the same time

Timer = Callable[[str], AbstractContextManager[None]]


def _routed(config: Config) -> RoutedShape | None:
    """Return the shape of the experts that engines must report, None without routing replay.

    Raise ConfigError for a dense model.
    """
    if not config.rollout.routing_replay:
        return None
    folder = HFFolder(config.model.path)
    where = str(folder.path / "config.json")
    _, shape = read_family(folder.config, where)
    if shape.experts is None:
        raise ConfigError(
            f"rollout.routing_replay: true replays the choice of experts, and {where} is of a dense model"
        )
    return RoutedShape(shape.num_layers, shape.experts.per_token, shape.experts.count)


def rollouts_folder(config: Config) -> Path:
    """Return the folder where finished groups are stored until their step."""
    return config.run.folder / "rollouts"


class Rollouts:
    """Draws prompts, samples their responses with the engines, and verifies the responses.

    Attributes:
        config: the run's configuration.
        task: the prompts and their verifier.
        reward: judges the responses: the task's verifier, or a reward of the user's own.
        tokenizer: decodes responses for the reward.
        pool: the engines.
        need_logmu: request the log-probabilities of the behavior policy.
        topk: request the K most likely tokens at every position; 0 for none.
        stop: ids of the stop tokens.
        sampled: sampling metrics of the newest batch, for the step's record.
        environment: the task if responses may have more than one turn, else None.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        pool: EnginePool,
        need_logmu: bool,
        topk: int = 0,
    ) -> None:
        self.config, self.task, self.tokenizer, self.pool = config, task, tokenizer, pool
        self.reward = make_reward(config.task, task)
        self.need_logmu, self.topk = need_logmu, topk
        self.stop = stop_token_ids(config.model.path)
        self.sampled: dict[str, float] = {}
        self._shown: Kept = []
        self.environment = task if task.max_turns > 1 else None
        # A tokenizer may not encode in one thread while it is used in another.
        self._loop_tokenizer = copy.deepcopy(tokenizer) if self.environment else None
        self._draws = PromptDraws()
        self._sampler: Scheduler | None = None

    def begin(self, state: TrainState) -> str:
        """Prepare to collect batches from `state` on.

        Returns: a line about finished groups that the previous run left on disk; "" if it left none.
        """
        config, rollout = self.config, self.config.rollout
        self._draws = PromptDraws(
            state.step * rollout.prompts_per_step if state.drawn is None else state.drawn, state.drawn_ahead
        )
        self._buffer = GroupJournal(rollouts_folder(config), self._settings_key())
        found, dropped = self._buffer.recover(lambda group: self._usable(group, state.version))
        settings = GroupSettings(
            seed=config.run.seed,
            samples=rollout.samples_per_prompt,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            stop_token_ids=self.stop,
            need_logmu=self.need_logmu,
            topk=self.topk,
            environment=self.environment,
            tokenizer=self._loop_tokenizer,
            routed=_routed(config),
            updates=rollout.max_staleness,
        )
        source = Source(self._prompt, self._rewards, rollout.max_prompt_tokens)
        bounds = Bounds(
            wanted=rollout.prompts_per_step,
            asked=math.ceil(
                round(rollout.oversample * rollout.prompts_per_step, 6)
            ),  # 1.1 x 10 is more than 11 in floats
            replaceable=rollout.max_resampled_groups,
            max_staleness=rollout.max_staleness,
            steps=config.run.steps,
            deterministic=rollout.deterministic,
        )
        self._sampler = Scheduler(self.pool, settings, source, bounds, self._draws, self._buffer, found)
        if not found and not dropped:
            return ""
        return (
            f"rollouts on disk: {len(found)} finished groups are read back, {dropped} thrown away (trained on already, "
            f"or sampled by other weights than version {state.version} and those before it, or with other settings)"
        )

    def collect(self, step: int, version: int, timer: Timer) -> Batch:
        """Return the batch of one step. With deterministic engines it is a pure function of weights, seed and step.

        Args:
            step: number of the step, from 0.
            version: weight version that the step trains from and that the engines serve.
            timer: returns a context manager that measures the time of a named phase.

        Raises:
            EngineError: trajectories were sampled under a version that is not allowed. The message names them.
        """
        assert self._sampler is not None, "collect before begin"
        self._prune_journal(step)
        with timer("rollout"):
            taken = self._sampler.take(step, version)
        groups = taken.chosen()
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        with timer("batch"):
            batch = make_batch(
                trajectories,
                self.config.objective.advantage,
                overlong_buffer=self.config.objective.overlong_buffer,
                max_new_tokens=self.config.rollout.max_new_tokens,
            )
        self._shown = keep_samples(groups, self.config.run.show_samples)
        self.sampled = {"truncated": float(np.mean([t.finish_reason == "length" for t in trajectories]))}
        self.sampled |= {f"rollout/{name}": value for name, value in taken.counts().items()}
        self.sampled["rollout/drawn"] = self._draws.num_consumed
        self.sampled |= {f"reward/{name}": value for name, value in taken.reward_metrics().items()}
        if self.config.task.reward_on_error == "zero":
            self.sampled["reward/errors"] = taken.reward_errors
        if self.environment is not None:
            self.sampled |= {f"tool/{name}": value for name, value in taken.tool_use()._asdict().items()}
        return batch

    def settle(self) -> None:
        """Wait, before a weight update, for the groups that must finish first; see `Scheduler.settle`."""
        if self._sampler is not None:
            self._sampler.settle()

    @property
    def sampling(self) -> dict[str, Any]:
        """How the newest batch was sampled, and which draws were consumed by then; JSON data for `restore`."""
        return {"sampled": self.sampled, "drawn": self.drawn, "shown": self._shown}

    def restore(self, step: int, version: int, sampling: dict[str, Any]) -> None:
        """Take over a batch that the previous run collected and this run trains on. Called in place of `collect`.

        Args:
            step: number of the step, from 0.
            version: weight version that the step trains from.
            sampling: the value of `sampling` when the batch was collected.
        """
        assert self._sampler is not None, "restore before begin"
        below, ahead = sampling["drawn"]
        self._draws.consume([*range(self._draws.below, below), *ahead])
        self._sampler.skip(step, version)
        self.sampled, self._shown = sampling["sampled"], sampling.get("shown", [])

    def samples(self, step: int, k3: Mapping[int, float]) -> list[ShownSample]:
        """Return `run.show_samples` prompts of the newest batch with their responses, as text.

        Args:
            step: number of the step that trained on the batch.
            k3: k3 by trajectory id, for the trajectories of which it is known.
        """
        return decode_samples(self._shown, step, self.tokenizer, k3)

    @property
    def drawn(self) -> tuple[int, tuple[int, ...]]:
        """The draws that were trained on, discarded or replaced, for `TrainState`.

        All draws below the first number, and the draws in the tuple.
        """
        return self._draws.below, self._draws.ahead

    def evaluate(self, step: int) -> Evaluation:
        """Return the rewards of the held-out prompts: of one response at temperature 0, and of `eval.samples`."""
        prompts = list(self.task.held_out[: self.config.eval.prompts])
        rewards: dict[str, list[list[float]]] = {}
        for name, temperature, samples in (("greedy", 0.0, 1), ("sampled", None, self.config.eval.samples)):
            trajectories = sample_groups(
                self.pool,
                prompts,
                self.config.rollout,
                first_id=0,
                first_group=0,
                seed=self.config.run.seed + 7919 * (step + 1),
                stop_token_ids=self.stop,
                need_logmu=False,
                temperature=temperature,
                samples=samples,
                environment=self.environment,
                tokenizer=self._loop_tokenizer,
            )
            scores = [score.value for score in self.verify(prompts, trajectories)]
            rewards[name] = [scores[at : at + samples] for at in range(0, len(scores), samples)]
        ids = [prompt.id for prompt in prompts]
        return Evaluation(step, ids, [one for (one,) in rewards["greedy"]], rewards["sampled"])

    def verify(self, prompts: list[Prompt], trajectories: list[Trajectory]) -> list[Score]:
        """Return one score per trajectory, for its last turn.

        Trajectories must be grouped by prompt, in the order of `prompts`.
        """
        turns = [t.last_turn for t in trajectories]
        texts = decode_turns(self.tokenizer, turns, self.stop)
        responses = [Response(text, turn) for text, turn in zip(texts, turns, strict=True)]
        samples = len(trajectories) // len(prompts)
        groups = [responses[at : at + samples] for at in range(0, len(responses), samples)]
        if len(groups) == 1:
            return self.reward.scores(prompts[0], groups[0])
        threads = ThreadPoolExecutor(_EVALUATED_TOGETHER)
        try:
            return [score for scores in threads.map(self.reward.scores, prompts, groups) for score in scores]
        finally:
            threads.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Release the resources of the reward."""
        self.reward.close()

    def _prompt(self, draw: int) -> Prompt:
        return prompts_for_step(self.task, draw, 1, self.config.run.seed)[0]

    def _rewards(self, prompt: Prompt, trajectories: list[Trajectory]) -> list[Score]:
        return self.verify([prompt], trajectories)

    def _usable(self, group: Group, version: int) -> bool:
        """Return whether this run has the weights that sampled the group, and the group's draw is not consumed."""
        newest = max((t.sampled_by[-1] for t in group.trajectories if t.sampled_by), default=0)
        return newest <= version and not self._draws.is_consumed(group.number)

    def _prune_journal(self, step: int) -> None:
        """Remove groups that neither this run nor a run resumed from the newest checkpoint can train on.

        The newest checkpoint may be complete already, or still being written.
        """
        folder = self.config.run.folder / "checkpoints"
        found = (path.name.removeprefix("step_").removesuffix(PARTIAL) for path in folder.glob("step_*"))
        numbers = [0, *(int(name) for name in found if name.isdecimal())]
        newest = newest_valid(folder)[0]
        whole = 0 if newest is None else int(newest.name.removeprefix("step_"))
        ahead = self.config.rollout.max_staleness + 1
        begins = [step, *(number for number in numbers if number >= whole)]
        self._buffer.keep({kept for begin in begins for kept in range(begin, begin + ahead)})

    def _settings_key(self) -> str:
        """Return, as JSON, everything that a group depends on except weights."""
        config, rollout = self.config, self.config.rollout
        digests = code_digests(config)
        asked = {
            "model": str(config.model.path),
            "precision": config.precision.model_dump(mode="json"),
            "task": config.task.model_dump(mode="json"),
            "code": {key: digests[key] for key in ("task.name", "task.reward") if key in digests},
            "seed": config.run.seed,
            "rollout": {
                name: getattr(rollout, name)
                for name in (
                    "samples_per_prompt",
                    "max_prompt_tokens",
                    "max_new_tokens",
                    "temperature",
                    "routing_replay",
                )
            },
            "columns": [self.need_logmu, self.topk],
        }
        return json.dumps(asked, sort_keys=True)
