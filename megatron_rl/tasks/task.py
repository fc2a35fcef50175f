"""Interface of a task: prompts to train on, held-out prompts, and a verifier of responses."""

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import BaseModel

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Observation:
    """What the environment returns after a turn of the model.

    Attributes:
        text: a tool's output, which the model reads next; None if the response is over.
        void: the turn neither called a tool nor answered, and is not trained on.
        failed: the tool was called, and the call raised or hit a limit.
    """

    text: str | None = None
    void: bool = False
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a demonstrated response.

    Attributes:
        text: the model's text.
        observation: the environment's text after it; None after the last turn.
    """

    text: str
    observation: str | None = None


class Task(ABC):
    """A set of problems with a verifier.

    The constructor may take any of `config` (the `task` section), `options` (an instance of `Options`), `tokenizer`,
    `seed` and `max_prompt_tokens`. They are given by name.

    Attributes:
        Options: pydantic model of the keys under `task.options`; None if the task has no such keys.
        train: problems to train on, fixed once the task is built.
        held_out: problems to evaluate on, also fixed. `train` and `held_out` share no problem.
        max_turns: turns of the model in one response, with an `observe` after each.
        summary: what was read, in one line for the user; "" if there is nothing to say.
    """

    Options: ClassVar[type[BaseModel] | None] = None
    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    max_turns: int = 1
    summary: str = ""

    @abstractmethod
    def verify(self, prompt: Prompt, response: str) -> float:
        """Return 1.0 if the decoded response answers the prompt, else 0.0. Never raises for what a model wrote."""

    def observe(self, prompt: Prompt, turn: str, *, last: bool) -> Observation:
        """Return the environment's observation of one turn. Thread-safe; may take seconds.

        Never raises for what a model wrote.

        Args:
            prompt: the problem.
            turn: the decoded text of a turn that ended by itself.
            last: True if the model does not read the observation. Then nothing is run, and there is no text.
        """
        return Observation()

    def solution(self, prompt: Prompt) -> str:
        """Return a response that verifies, without the end-of-sequence token, for supervised warm-up."""
        return prompt.answer

    def demonstration(self, prompt: Prompt) -> list[Turn]:
        """Return all turns up to an answer that verifies, without end-of-sequence tokens, for supervised warm-up."""
        return [Turn(self.solution(prompt))]

    def close(self) -> None:  # noqa: B027  Most tasks hold no resources.
        """Release the verifier's resources. The task must not be used afterwards."""


def prompts_for_step(task: Task, step: int, count: int, seed: int) -> list[Prompt]:
    """Return the training prompts of one step.

    The result depends only on the arguments, so a resumed run draws the same prompts. The steps go through one
    permutation of the training set after another. Every epoch has its own permutation, seeded by (seed, epoch). A step
    may cross from one epoch to the next.

    Args:
        task: the task whose `train` is drawn from.
        step: the step, from 0.
        count: number of prompts.
        seed: seed of the permutations.

    Raises:
        UserError: `step` is negative, `count` is below 1, or the task has no training prompts.
    """
    if step < 0 or count < 1:
        raise UserError(f"cannot draw {count} prompts for step {step}: step must be >= 0, count >= 1")
    size = len(task.train)
    if size == 0:
        raise UserError("the task has no training prompts")
    drawn = np.arange(step * count, (step + 1) * count)
    rows = np.empty(count, dtype=np.int64)
    for epoch in np.unique(drawn // size):
        here = drawn // size == epoch
        rows[here] = _order(size, seed, int(epoch))[drawn[here] % size]
    return [task.train[row] for row in rows.tolist()]


@lru_cache(maxsize=8)  # because prompts are also drawn one by one
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed % 2**64, epoch]).permutation(size)


def encode_plain(tokenizer: "PreTrainedTokenizerFast", texts: list[str]) -> list[tuple[int, ...]]:
    """Return the tokens of plain texts, with the special tokens that the tokenizer puts in front.

    Raises ConfigError if the tokenizer makes no token of a text or cannot spell it, or if it ends every text with an
    end-of-sequence token, after which the model would have to write.
    """
    encoded = [tuple(row) for row in tokenizer(texts)["input_ids"]]
    for text, tokens in zip(texts, encoded, strict=True):
        check_spelled(tokenizer, text, tokens)
        if tokens[-1] == tokenizer.eos_token_id:
            raise ConfigError(f"the tokenizer appends {tokenizer.eos_token!r} to prompts; turn its add_eos_token off")
    return encoded


def check_spelled(tokenizer: "PreTrainedTokenizerFast", text: str, tokens: tuple[int, ...]) -> None:
    """Raise ConfigError if the tokenizer makes no token of a text or cannot spell it."""
    if not tokens:
        raise ConfigError(f"the tokenizer makes no token of {reprlib.repr(text)}")
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokens:
        raise ConfigError(f"the tokenizer cannot spell {reprlib.repr(text)}: it contains {tokenizer.unk_token!r}")
