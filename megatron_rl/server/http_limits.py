"""Limits of the embedded server for what a client sends: size and time of a request's header and body."""

import asyncio
import time

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_BODY = 1 << 26  # bytes
HEADER_S = 30.0  # from the first byte of a request, or from the connection, to the end of its header
BODY_S = 60.0


class BodyLimits:
    """ASGI middleware: a body that is too large gets status 413, one that takes too long 408."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        end, size, complete = time.monotonic() + BODY_S, 0, False

        async def limited() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(max(end - time.monotonic(), 0.0)):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {BODY_S:g} s") from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > MAX_BODY:
                raise HTTPException(413, f"the body has more than {MAX_BODY >> 20} MiB")
            return message

        await self._app(scope, limited, send)


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP protocol, which closes a connection whose next request header does not arrive in time."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time of the first header."""
        super().connection_made(transport)
        self._start()

    def data_received(self, data: bytes) -> None:
        """Read data. They may end a header, or begin one."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._start()
        else:
            self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop()
        super().connection_lost(exc)

    def _start(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEADER_S, self._close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        self._timer = None
        self.transport.close()
