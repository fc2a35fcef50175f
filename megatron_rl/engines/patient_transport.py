"""HTTP transport of the trainer. A shortage of this machine is not blamed on an engine.

Every request in flight has a connection of its own, and every connection is an open file. A server may close one that
is kept, just when a request is sent over it. aiohttp reads and writes the HTTP: httpx's own transport takes longer.
"""

import asyncio
import errno
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import aiohttp
import httpx

from megatron_rl.errors import EngineError

_SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN}
# Failures to look up any name. A name that does not exist is another one (EAI_NONAME), and the engine's.
_LOOKUPS = {socket.EAI_AGAIN, socket.EAI_MEMORY, socket.EAI_SYSTEM}
_NO_THREAD = "can't start new thread"  # Python's RuntimeError has no number
_WAIT_S = 30.0  # time that a request waits for what this machine lacks
_PAUSE_S = 0.05


def local_shortage(error: BaseException | None) -> tuple[str, str] | None:
    """Return what this machine lacks, and how to provide it, if that caused an error. Return None otherwise."""
    while error is not None:
        if isinstance(error, socket.gaierror):
            if error.errno in _LOOKUPS:
                return str(error.strerror), "see that this machine can look up host names"
        elif isinstance(error, OSError) and error.errno in _SHORTAGES:
            mend = "raise `ulimit -n`, or lower rollout.prompts_per_step or rollout.samples_per_prompt"
            return os.strerror(error.errno), mend
        elif isinstance(error, RuntimeError) and _NO_THREAD in str(error):
            return _NO_THREAD, "raise `ulimit -u`, or the container's limit of processes"
        error = error.__cause__ or error.__context__
    return None


class PatientTransport(httpx.AsyncBaseTransport):
    """A transport that repeats a request which this machine could not open a connection for."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request. Raises EngineError if this machine lacks files, ports or threads for a while."""
        end = time.monotonic() + _WAIT_S
        while True:
            try:
                return await self._send(request)
            except (httpx.ConnectError, RuntimeError) as error:  # nothing was sent
                shortage = local_shortage(error)
                if shortage is None:
                    raise
                if time.monotonic() > end:
                    raise EngineError(
                        f"this machine cannot open another connection ({shortage[0]}), so {request.url} was not asked: "
                        f"{shortage[1]}"
                    ) from error
            await asyncio.sleep(_PAUSE_S)

    async def _send(self, request: httpx.Request) -> httpx.Response:
        if self._session is None:  # in the loop that uses it
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            self._session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        limits = request.extensions["timeout"]
        with _as_httpx():
            response = await self._session.request(
                request.method,
                str(request.url),
                headers=request.headers,
                data=request.content or None,
                allow_redirects=False,
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(sock_connect=limits["connect"], sock_read=limits["read"]),
            )
        return httpx.Response(response.status, headers=response.raw_headers, stream=_Body(response), request=request)

    async def aclose(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()


class _Body(httpx.AsyncByteStream):
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx():
            async for part in self._response.content.iter_any():
                yield part

    async def aclose(self) -> None:
        self._response.close()


@contextmanager
def _as_httpx() -> Iterator[None]:
    """Raise the errors of aiohttp as those of httpx."""
    try:
        yield
    except aiohttp.ConnectionTimeoutError as error:
        raise httpx.ConnectTimeout(str(error)) from error
    except aiohttp.ServerTimeoutError as error:
        raise httpx.ReadTimeout(str(error)) from error
    except aiohttp.ClientConnectorError as error:
        raise httpx.ConnectError(str(error)) from error
    except aiohttp.ClientOSError as error:
        raise httpx.ReadError(str(error)) from error
    except aiohttp.ClientError as error:
        raise httpx.RemoteProtocolError(str(error)) from error
