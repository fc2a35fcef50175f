"""Rank 0's side of a step: prompts out, verified trajectories in, one batch for everybody."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_rl.config import Config
from megatron_rl.errors import ConfigError, EngineError
from megatron_rl.rollout.client import EnginePool
from megatron_rl.rollout.sampling import sample_groups
from megatron_rl.tasks import Task, prompts_for_step
from megatron_rl.training.batches import make_batch
from megatron_rl.types import Batch, Prompt, Trajectory

Timer = Callable[[str], AbstractContextManager[None]]


def stop_token_ids(folder: Path) -> tuple[int, ...]:
    """The `eos_token_id` of generation_config.json and config.json. Raises ConfigError when neither names one."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            found.update([value] if isinstance(value, int) else value or [])
    if not found:
        raise ConfigError(f"{folder} names no eos_token_id in generation_config.json or config.json: responses could never end")
    return tuple(sorted(found))


class Rollouts:
    """Draws prompts, has them answered by the engines, verifies the answers."""

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
        self.need_logmu, self.topk = need_logmu, topk
        self.stop = stop_token_ids(config.model.path)
        self.truncated = 0.0

    def collect(self, step: int, version: int, timer: Timer) -> Batch:
        """The batch of one step; a pure function of weights, seed and step when the engine is deterministic.

        Raises EngineError naming the trajectories that were not sampled under weight version `version`.
        """
        config = self.config.rollout
        per_step = config.prompts_per_step * config.samples_per_prompt
        prompts = prompts_for_step(self.task, step, config.prompts_per_step, self.config.run.seed)
        with timer("rollout"):
            trajectories = sample_groups(
                self.pool,
                prompts,
                config,
                first_id=step * per_step,
                first_group=step * config.prompts_per_step,
                seed=self.config.run.seed,
                stop_token_ids=self.stop,
                need_logmu=self.need_logmu,
                topk=self.topk,
            )
        stale = [t.id for t in trajectories if any(span.version != version for span in t.versions)]
        if stale:
            raise EngineError(f"trajectories {stale[:20]} were not sampled under weight version {version}: an engine restarted")
        with timer("reward"):
            rewards = self.verify(prompts, trajectories)
            batch = make_batch(
                [t.with_reward(r) for t, r in zip(trajectories, rewards, strict=True)],
                self.config.objective.advantage,
                overlong_buffer=self.config.objective.overlong_buffer,
                max_new_tokens=config.max_new_tokens,
            )
        self.truncated = float(np.mean([t.finish_reason == "length" for t in trajectories]))
        return batch

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out pass rates: `eval/greedy` (one answer, temperature 0) and `eval/sampled` (mean over samples)."""
        prompts = list(self.task.held_out[: self.config.eval.prompts])
        rates = {}
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
            )
            rates[f"eval/{name}"] = float(np.mean(self.verify(prompts, trajectories)))
        return rates

    def verify(self, prompts: list[Prompt], trajectories: list[Trajectory]) -> list[float]:
        """One reward per trajectory; trajectories come grouped by prompt, in the order of `prompts`."""
        texts = self.tokenizer.batch_decode([list(t.response_tokens) for t in trajectories], skip_special_tokens=True)
        samples = len(trajectories) // len(prompts)
        return [self.task.verify(prompts[i // samples], text) for i, text in enumerate(texts)]
