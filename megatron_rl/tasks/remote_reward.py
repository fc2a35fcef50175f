"""A reward server: one POST for the responses to one prompt, repeated while the server cannot be reached."""

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from megatron_rl.config import TaskConfig
from megatron_rl.errors import UserError
from megatron_rl.tasks.limited_calls import Fault, call_in_order
from megatron_rl.tasks.reward import OwnReward, Response, prompt_arguments
from megatron_rl.types import Prompt

PAUSES_S = (0.5, 1.0, 2.0)  # before each further attempt


class RemoteReward(OwnReward):
    """Reward of a server.

    The body is `{"prompts": [{"id", "prompt", "response", "tokens", "metadata", "answer"}, ...]}`, the response
    `{"rewards": [number or {"score": number, metric: number}, ...]}`, one for each prompt in order.

    Args:
        config: the `task` section.
        url: the URL of the server.
    """

    def __init__(self, config: TaskConfig, url: str) -> None:
        super().__init__(config, f"task.reward {url}")
        self._url = url
        # trust_env=False, as for the engines: no HTTP proxy of the site. `call_in_order` keeps the time limit; the
        # client's own, which starts again with every byte, only ends requests that nobody waits for.
        self._client = httpx.Client(timeout=2 * self.limit_s, trust_env=False)

    def outcomes(self, prompt: Prompt, responses: Sequence[Response]) -> Iterator[Any]:
        told = prompt_arguments(prompt)
        rows = [{"id": prompt.id, **told, "response": r.text, "tokens": r.token_list()} for r in responses]
        try:
            body = json.dumps({"prompts": rows}, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{self.place}: metadata of prompt '{prompt.id}' cannot be sent as JSON: {error}"
            ) from error
        reply = self._post(body)
        if isinstance(reply, Fault):
            return iter([reply] * len(responses))
        rewards = reply.get("rewards") if isinstance(reply, dict) else None
        if not isinstance(rewards, list) or len(rewards) != len(responses):
            fault = Fault(f"responded with {_cut(repr(reply))}; {{'rewards': [{len(responses)} rewards]}} is expected")
            return iter([fault] * len(responses))
        return iter(rewards)

    def close(self) -> None:
        self._client.close()

    def _post(self, body: bytes) -> Any:
        """Return the decoded reply, or a Fault. Connection errors and status 5xx are tried again, nothing else."""
        fault = Fault("was not called")
        for pause in (0.0, *PAUSES_S):
            time.sleep(pause)
            (reply,) = call_in_order([lambda: self._attempt(body)], self.limit_s)
            if not isinstance(reply, _Unreachable):
                return reply
            fault = Fault(f"{reply.reason}, {len(PAUSES_S) + 1} times in a row")
        return fault

    def _attempt(self, body: bytes) -> Any:
        try:
            reply = self._client.post(self._url, content=body, headers={"Content-Type": "application/json"})
        except httpx.TransportError as error:
            return _Unreachable(f"cannot be reached ({type(error).__name__}: {error})")
        if reply.status_code >= 500:
            return _Unreachable(f"responded with status {reply.status_code}")
        if reply.status_code != 200:
            return Fault(f"responded with status {reply.status_code}: {_cut(reply.text)}")
        try:
            return reply.json()
        except ValueError:
            return Fault(f"responded with {_cut(repr(reply.text))}, which is no JSON")


class _Unreachable(Fault):
    """A fault that may pass."""


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
