"""What a task is: prompts to train on, prompts kept apart, and a verdict on a response."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Observation:
    """What comes after a turn of the model. text: a tool's output, which the model reads next; None: the response is over.
    void: the turn neither called a tool nor answered, and is not trained on. failed: the tool was called, and the call
    raised or hit a limit."""

    text: str | None = None
    void: bool = False
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a model response written down, and what the environment says after it; None after the last one."""

    text: str
    observation: str | None = None


class Task(ABC):
    """A set of problems with a verifier. `train` and `held_out` share no problem; both are fixed once built.

    max_turns: turns of the model in one response, with an `observe` after each.
    """

    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    max_turns: int = 1

    @abstractmethod
    def verify(self, prompt: Prompt, response: str) -> float:
        """1.0 when the decoded response answers the prompt, else 0.0. Never raises for what a model wrote."""

    def observe(self, prompt: Prompt, turn: str, *, last: bool) -> Observation:
        """The environment's answer to the decoded text of one turn that ended by itself. Thread-safe; may take seconds.

        last: nobody reads what comes back: nothing is run, and there is no text. Never raises for what a model wrote.
        """
        return Observation()

    def solution(self, prompt: Prompt) -> str:
        """A response that verifies, for supervised warm-up; without the end-of-sequence token."""
        return prompt.answer

    def demonstration(self, prompt: Prompt) -> list[Turn]:
        """The whole way to an answer that verifies, for supervised warm-up; turns without their end-of-sequence tokens."""
        return [Turn(self.solution(prompt))]

    def close(self) -> None:  # noqa: B027  most tasks hold nothing
        """Release what the verifier holds; the task is not used afterwards."""


def prompts_for_step(task: Task, step: int, count: int, seed: int) -> list[Prompt]:
    """The `count` training prompts of `step` (from 0): a pure function of its arguments, so a resumed run draws the same.

    Steps walk through one permutation of the training set after another; every epoch has its own, seeded by
    (seed, epoch), and a step may cross from one to the next.
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


@lru_cache(maxsize=8)  # prompts are drawn one by one, too
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed % 2**64, epoch]).permutation(size)


def encode_plain(tokenizer: "PreTrainedTokenizerFast", texts: list[str]) -> list[tuple[int, ...]]:
    """Tokens of plain texts, with the special tokens the tokenizer puts in front.

    Raises ConfigError when the tokenizer cannot spell a text, or ends every text with a token the model would have to
    write after.
    """
    encoded = [tuple(row) for row in tokenizer(texts)["input_ids"]]
    for text, tokens in zip(texts, encoded, strict=True):
        if not tokens:
            raise ConfigError(f"the tokenizer makes no token of {text!r}")
        if tokens[-1] == tokenizer.eos_token_id:
            raise ConfigError(f"the tokenizer appends {tokenizer.eos_token!r} to prompts; turn its add_eos_token off")
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokens:
            raise ConfigError(f"the tokenizer cannot spell {text!r}: it contains {tokenizer.unk_token!r}")
    return encoded


def strip_end(tokenizer: "PreTrainedTokenizerFast", response: str) -> str:
    """The response without white space at its ends and end-of-sequence or padding tokens after it."""
    ends = [token for token in (tokenizer.eos_token, tokenizer.pad_token) if token]
    response = response.strip()
    while any(response.endswith(end) for end in ends):
        for end in ends:
            response = response.removesuffix(end).rstrip()
    return response
