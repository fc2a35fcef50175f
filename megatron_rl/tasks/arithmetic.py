"""Addition and subtraction: a task that needs no data, for tiny models and tests."""

from collections.abc import Callable, Sequence
from math import isqrt
from typing import TYPE_CHECKING, overload

import numpy as np

from megatron_rl.config import TaskConfig
from megatron_rl.errors import ConfigError
from megatron_rl.tasks.end_tokens import strip_end
from megatron_rl.tasks.task import Task, encode_plain
from megatron_rl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ArithmeticTask(Task):
    """Task `12+34=` -> `46`, `34-12=` -> `22`: every problem with operands in [0, max_operand) and a result >= 0.

    The problems are shuffled by `seed`. The first `held_out` are held out and the rest is trained on.

    Args:
        config: the `task` section.
        tokenizer: tokenizes the prompts.
        seed: seed of the shuffle.
        max_prompt_tokens: a prompt with more tokens is an error.

    Raises:
        ConfigError: no problem is left to train on, or a prompt has more than `max_prompt_tokens` tokens.
    """

    def __init__(
        self, config: TaskConfig, tokenizer: "PreTrainedTokenizerFast", *, seed: int, max_prompt_tokens: int
    ) -> None:
        self._tokenizer = tokenizer
        size = config.max_operand
        total = size * size + size * (size + 1) // 2
        if config.held_out >= total:
            raise ConfigError(
                f"task.max_operand {size} gives {total} problems and task.held_out keeps {config.held_out} of them "
                "apart, which leaves none to train on: raise the former or lower the latter"
            )
        order = np.random.default_rng([seed % 2**64, total]).permutation(total)

        def problem(number: int) -> tuple[str, int]:
            return sum_or_difference(number, size)

        self.held_out = Problems(order[: config.held_out], problem, tokenizer, max_prompt_tokens)
        self.train = Problems(order[config.held_out :], problem, tokenizer, max_prompt_tokens)
        self.train.encode(f"{size - 1}+{size - 1}=")
        self.train.encode(f"{size - 1}-{size - 1}=")

    def verify(self, prompt: Prompt, response: str) -> float:
        """Return 1.0 if the response, without its end token and outer white space, is exactly the answer, else 0.0."""
        return float(strip_end(self._tokenizer, response) == prompt.answer)


def sum_or_difference(number: int, size: int) -> tuple[str, int]:
    """Return the problem with that number, and its answer. 0 ... size^2 - 1 are a+b, the rest are a-b with b <= a."""
    if number < size**2:
        a, b = divmod(number, size)
        return f"{a}+{b}", a + b
    # Row a of the triangle b <= a starts at a (a + 1) / 2.
    number -= size**2
    a = (isqrt(8 * number + 1) - 1) // 2
    b = number - a * (a + 1) // 2
    return f"{a}-{b}", a - b


class Problems(Sequence[Prompt]):
    """Sequence of calculations, each generated from its number and tokenized on access.

    Args:
        numbers: numbers of the calculations, in order.
        problem: returns the calculation with a number, and its answer.
        tokenizer: tokenizes the prompts.
        max_tokens: a prompt with more tokens raises ConfigError.
    """

    def __init__(
        self,
        numbers: np.ndarray,
        problem: Callable[[int], tuple[str, int]],
        tokenizer: "PreTrainedTokenizerFast",
        max_tokens: int,
    ) -> None:
        self._numbers, self._problem = numbers, problem
        self._tokenizer, self._max_tokens = tokenizer, max_tokens

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        if isinstance(index, slice):
            return [self._prompt(int(number)) for number in self._numbers[index]]
        return self._prompt(int(self._numbers[index]))

    def _prompt(self, number: int) -> Prompt:
        problem, answer = self._problem(number)
        return Prompt(id=problem, text=f"{problem}=", tokens=self.encode(f"{problem}="), answer=str(answer))

    def encode(self, text: str) -> tuple[int, ...]:
        tokens = encode_plain(self._tokenizer, [text])[0]
        if len(tokens) > self._max_tokens:
            raise ConfigError(
                f"arithmetic prompt {text!r} has {len(tokens)} tokens, "
                f"rollout.max_prompt_tokens is {self._max_tokens}: raise rollout.max_prompt_tokens"
            )
        return tokens
