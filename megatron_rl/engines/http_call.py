"""One HTTP request to a server of the pool: the size of its response is bounded, and "later" is no refusal."""

import asyncio
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from megatron_rl.errors import EngineError
from megatron_rl.protocol.generation import error_message

LATER = frozenset({408, 409, 425, 429})  # timed out in a queue, conflict, too early, too many requests
SMALL_RESPONSE = 1 << 20  # bytes, for calls that return a few fields
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0


class ResponseTooLarge(EngineError):
    """A response is larger than any right one."""


async def call(
    http: httpx.AsyncClient, method: str, url: str, *, max_bytes: int = SMALL_RESPONSE, **more: Any
) -> httpx.Response:
    """Send a request and return the complete response.

    Args:
        http: the client.
        method: HTTP method.
        url: URL of the call.
        max_bytes: largest body, after decompression.
        more: arguments of `httpx.AsyncClient.stream`.

    Raises:
        ResponseTooLarge: the body is larger.
        httpx.HTTPError: the request failed.
    """
    async with http.stream(method, url, **more) as response:
        parts, size = [], 0
        async for part in response.aiter_bytes():
            size += len(part)
            if size > max_bytes:
                raise ResponseTooLarge(f"{url} sent more than {max_bytes >> 10} KiB, which no right response has")
            parts.append(part)
    headers = {name: response.headers[name] for name in ("retry-after",) if name in response.headers}
    return httpx.Response(response.status_code, headers=headers, content=b"".join(parts))


def says_later(response: httpx.Response) -> bool:
    """Return whether a server asks for the same request again later, instead of refusing it."""
    return response.status_code in LATER or (response.status_code == 503 and "retry-after" in response.headers)


class Patience:
    """Bounded waiting for a server that puts a request off.

    Args:
        limit_s: seconds in all.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._end = time.monotonic() + limit_s
        self._pause_s = _FIRST_PAUSE_S

    async def wait(self, response: httpx.Response) -> bool:
        """Wait as long as the response asks for, else a pause that doubles. Return False if the time is used up."""
        left = self._end - time.monotonic()
        asked = _retry_after_s(response)
        pause, self._pause_s = self._pause_s, min(2 * self._pause_s, _LONGEST_PAUSE_S)
        if left <= 0 or (asked is not None and asked > left):
            return False
        await asyncio.sleep(min(pause if asked is None else asked, left))
        return True


def _retry_after_s(response: httpx.Response) -> float | None:
    """Return the seconds of a Retry-After header, which may also be a date. None without a valid one."""
    text = response.headers.get("retry-after", "").strip()
    if text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        then = parsedate_to_datetime(text)
    except (ValueError, IndexError):
        return None
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return max((then - datetime.now(UTC)).total_seconds(), 0.0)


def put_off_error(url: str, path: str, response: httpx.Response, limit_s: float) -> EngineError:
    """Return the error for a server that put a request off until the time was used up.

    Args:
        url: base URL of the server.
        path: path of the call.
        response: the last response.
        limit_s: seconds that the caller waited for at most.
    """
    wanted = response.headers.get("retry-after")
    asks = f", asks for {wanted} s more" if wanted else ""
    return EngineError(
        f"{url}{path} put the request off for {limit_s:g} s (status {response.status_code}{asks}): "
        f"{error_message(response)}: raise the server's limit of queued requests, or lower rollout.prompts_per_step"
    )
