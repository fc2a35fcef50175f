"""HTTP transport of the trainer. A shortage of this machine is not blamed on an engine.

Every request in flight has a connection, and every connection is an open file. The name of a host is looked up in a
thread.
"""

import asyncio
import errno
import os
import socket
import time

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


class PatientTransport(httpx.AsyncHTTPTransport):
    """A transport that repeats a request which this machine could not open a connection for."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request. Raises EngineError if this machine lacks files, ports or threads for a while."""
        end = time.monotonic() + _WAIT_S
        while True:
            try:
                return await super().handle_async_request(request)
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
