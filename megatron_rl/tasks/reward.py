"""Rewards: the number of every response. A task's own verifier, a function of the user's own, or a server."""

import inspect
import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any

import numpy as np

from megatron_rl.config import TaskConfig
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.plugins import accepted_names, load_plugin, source_place
from megatron_rl.tasks.limited_calls import CallLoop, Fault, call_in_order
from megatron_rl.tasks.task import Task
from megatron_rl.types import Prompt, TokenIds

# `reward/<name>` of a step's record that are not metrics of the user's.
_RESERVED = ("mean", "std", "errors")


@dataclass(frozen=True, slots=True)
class Response:
    """What a reward judges: the text of the model's last turn, and its token ids."""

    text: str
    tokens: TokenIds

    def token_list(self) -> list[int]:
        """Return the token ids as Python numbers, for the user's own code."""
        ids: list[int] = np.asarray(self.tokens).tolist()
        return ids


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one response.

    Attributes:
        value: the reward, finite.
        metrics: other finite numbers of a reward of the user's own, by name.
        failed: the reward could not be computed, and `task.reward_on_error: zero` made it 0.
    """

    value: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    failed: bool = False


class Reward(ABC):
    """Returns the scores of responses."""

    @abstractmethod
    def scores(self, prompt: Prompt, responses: Sequence[Response]) -> list[Score]:
        """Return the scores of the responses to one prompt. Called in several threads at the same time.

        Raises:
            UserError: a reward of the user's own failed, and `task.reward_on_error` is raise.
        """

    def close(self) -> None:  # noqa: B027  most rewards hold no resources
        """Release the resources of the reward."""


class Verifier(Reward):
    """The verifier of a built-in task, called as it is."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def scores(self, prompt: Prompt, responses: Sequence[Response]) -> list[Score]:
        return [Score(self._task.verify(prompt, response.text)) for response in responses]


class OwnReward(Reward):
    """Reward of the user's own: `outcomes` computes, this class checks and applies `task.reward_on_error`.

    Args:
        config: the `task` section.
        place: names the reward in messages, with file:line.
    """

    def __init__(self, config: TaskConfig, place: str) -> None:
        self.limit_s, self.place = config.reward_timeout_s, place
        self._raises = config.reward_on_error == "raise"

    @abstractmethod
    def outcomes(self, prompt: Prompt, responses: Sequence[Response]) -> Iterator[Any]:
        """Yield what the user's code returned for each response, in order, or a Fault."""

    def scores(self, prompt: Prompt, responses: Sequence[Response]) -> list[Score]:
        return [self._score(prompt, outcome) for outcome in self.outcomes(prompt, responses)]

    def _score(self, prompt: Prompt, outcome: Any) -> Score:
        read = outcome if isinstance(outcome, Fault) else read_score(outcome)
        if isinstance(read, Score):
            return read
        if self._raises:
            raise UserError(f"{self.place} {read.reason}, for a response to prompt '{prompt.id}'")
        return Score(0.0, failed=True)


def read_score(value: Any) -> Score | Fault:
    """Return the score that the user's code returned: a number, or a dict of `score` and metrics; else a Fault."""
    numbers = value if isinstance(value, dict) else {"score": value}
    if "score" not in numbers:
        return Fault(f"returned a dict without 'score': {reprlib.repr(value)}")
    for name, number in numbers.items():
        if not isinstance(number, Real):
            what = reprlib.repr(value) if name == "score" and value is number else f"'{name}': {reprlib.repr(number)}"
            return Fault(f"returned {what}, a {type(number).__name__}; a number or {{'score': number}} is expected")
        if not math.isfinite(number):
            return Fault(f"returned '{name}': {number!r}, which is not finite")
        if name in _RESERVED or not isinstance(name, str):
            return Fault(f"returned the metric {name!r}; metrics need a name other than {', '.join(_RESERVED)}")
    metrics = {name: float(number) for name, number in numbers.items() if name != "score"}
    return Score(float(numbers["score"]), metrics)


class CalledReward(OwnReward):
    """A function of the user's own, called once for each response.

    A plain function is called in a thread, for one response of a group after the other. An async function is called
    in one event loop, for all responses of a group at the same time.

    Args:
        config: the `task` section.
        call: returns the score of one response; maybe async.
        place: names the function in messages, with file:line.
    """

    def __init__(self, config: TaskConfig, call: Callable[[Prompt, Response], Any], place: str) -> None:
        super().__init__(config, place)
        self._call = call
        self._loop = CallLoop(self.limit_s) if inspect.iscoroutinefunction(call) else None

    def outcomes(self, prompt: Prompt, responses: Sequence[Response]) -> Iterator[Any]:
        calls = [partial(self._call, prompt, response) for response in responses]
        if self._loop is not None:
            return iter(self._loop.call_together(calls))
        return call_in_order(calls, self.limit_s)

    def close(self) -> None:
        if self._loop is not None:
            self._loop.close()


def load_reward(config: TaskConfig, path: str) -> CalledReward:
    """Return the reward of an import path. Raise ConfigError if it is no function that can be called."""
    call = load_plugin(path, "task.reward")
    place = f"task.reward {path.rpartition(':')[2]} ({source_place(call)})"
    if not callable(call) or inspect.isclass(call):
        raise ConfigError(f"{place} is a {type(call).__name__}; give a function")
    # A class with `__call__` may be async as well, and its signature is that of the instance.
    function = call if inspect.isroutine(call) else call.__call__
    names = accepted_names(function, ("prompt", "response", "tokens", "metadata", "answer"), "task.reward")

    def arguments(prompt: Prompt, response: Response) -> dict[str, Any]:
        offered = {**prompt_arguments(prompt), "response": response.text}
        if "tokens" in names:
            offered["tokens"] = response.token_list()
        return {name: offered[name] for name in names}

    if inspect.iscoroutinefunction(function):

        async def called(prompt: Prompt, response: Response) -> Any:
            return await function(**arguments(prompt, response))

        return CalledReward(config, called, place)
    return CalledReward(config, lambda prompt, response: function(**arguments(prompt, response)), place)


def prompt_arguments(prompt: Prompt) -> dict[str, Any]:
    """Return the arguments that describe a prompt: `prompt` (text or chat messages), `metadata` and `answer`."""
    asked = list(prompt.messages) or prompt.text
    return {"prompt": asked, "metadata": dict(prompt.metadata), "answer": prompt.answer}
