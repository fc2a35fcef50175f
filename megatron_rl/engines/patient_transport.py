"""HTTP transport of the trainer. A shortage of this machine's own files or ports is not blamed on an engine.

Every request in flight has a connection, and every connection is an open file.
"""

import asyncio
import errno
import os
import time

import httpx

from megatron_rl.errors import EngineError

_SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN}
_WAIT_S = 30.0  # time that a request waits for a free file or port
_PAUSE_S = 0.05


def local_shortage(error: BaseException | None) -> str:
    """Return the operating system's text if the cause of an error is a shortage of this machine, else ""."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _SHORTAGES:
            return os.strerror(error.errno)
        error = error.__cause__ or error.__context__
    return ""


class PatientTransport(httpx.AsyncHTTPTransport):
    """A transport that repeats a request which this machine could not open a connection for."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request. Raises EngineError if this machine has no free file or port for a while."""
        end = time.monotonic() + _WAIT_S
        while True:
            try:
                return await super().handle_async_request(request)
            except httpx.ConnectError as error:  # nothing was sent
                shortage = local_shortage(error)
                if not shortage:
                    raise
                if time.monotonic() > end:
                    raise EngineError(
                        f"this machine cannot open another connection ({shortage}), so {request.url} was not asked: "
                        "raise `ulimit -n`, or lower rollout.prompts_per_step or rollout.samples_per_prompt"
                    ) from error
            await asyncio.sleep(_PAUSE_S)
