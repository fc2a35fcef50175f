"""Running totals: generated sums whose steps are written out, so that tiny models write responses of many tokens."""

from typing import TYPE_CHECKING

import numpy as np

from megatron_rl.config import TaskConfig
from megatron_rl.errors import ConfigError
from megatron_rl.tasks.end_tokens import strip_end
from megatron_rl.tasks.task import Task, encode_plain
from megatron_rl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class RunningTotalTask(Task):
    """Task `4+7-3+9=` -> `110817`: the total after each term, two digits each. The last two digits are the answer.

    Terms are digits. Every total is in [0, 100). A response has 2 (`task.terms` - 1) digits.

    Args:
        config: the `task` section.
        tokenizer: tokenizes the prompts.
        seed: seed of the problems.
        max_prompt_tokens: a prompt with more tokens is an error.

    Raises:
        ConfigError: no problem is left to train on, or a prompt has more than `max_prompt_tokens` tokens.
    """

    def __init__(
        self, config: TaskConfig, tokenizer: "PreTrainedTokenizerFast", *, seed: int, max_prompt_tokens: int
    ) -> None:
        if config.held_out >= config.problems:
            raise ConfigError(
                f"task.problems is {config.problems} and task.held_out keeps {config.held_out} of them apart, "
                "which leaves none to train on: raise the former or lower the latter"
            )
        self._tokenizer = tokenizer
        problems = running_totals(config.problems, config.terms, seed)
        tokens = encode_plain(tokenizer, [f"{problem}=" for problem in problems])
        longest = max(map(len, tokens))
        if longest > max_prompt_tokens:
            raise ConfigError(
                f"a prompt of task.terms {config.terms} has {longest} tokens, rollout.max_prompt_tokens is "
                f"{max_prompt_tokens}: raise rollout.max_prompt_tokens"
            )
        self._steps = problems
        prompts = [
            Prompt(id=problem, text=f"{problem}=", tokens=row, answer=steps[-2:])
            for (problem, steps), row in zip(problems.items(), tokens, strict=True)
        ]
        self.held_out, self.train = prompts[: config.held_out], prompts[config.held_out :]

    def verify(self, prompt: Prompt, response: str) -> float:
        """Return 1.0 if the last two characters before the end token are the last total, else 0.0."""
        return float(strip_end(self._tokenizer, response)[-2:] == prompt.answer)

    def solution(self, prompt: Prompt) -> str:
        """Return every total, two digits each."""
        return self._steps[prompt.id]


def running_totals(count: int, terms: int, seed: int) -> dict[str, str]:
    """Return different problems, each with its totals: `4+7-3+9` -> `110817`.

    Args:
        count: number of problems.
        terms: digits in one problem.
        seed: seed of the problems; the first of them are the same for every `count`.
    """
    rng = np.random.default_rng([seed % 2**64, terms])
    problems: dict[str, str] = {}
    while len(problems) < count:
        problem, totals = _running_total(rng.integers(0, 10, terms).tolist(), rng.integers(0, 2, terms).tolist())
        problems[problem] = totals
    return problems


def _running_total(digits: list[int], signs: list[int]) -> tuple[str, str]:
    """Return one problem and its totals. A sign that would leave [0, 100) is turned."""
    total, problem, totals = digits[0], str(digits[0]), ""
    for digit, sign in zip(digits[1:], signs[1:], strict=True):
        plus = total - digit < 0 or (bool(sign) and total + digit < 100)
        total += digit if plus else -digit
        problem += f"{'+' if plus else '-'}{digit}"
        totals += f"{total:02d}"
    return problem, totals
