"""Who may use the embedded server, and where it may write."""

import secrets
from dataclasses import dataclass
from pathlib import Path

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from megatron_rl.errors import EngineError
from megatron_rl.protocol.api_key import key_headers

_OPEN = ("/health",)  # paths that want no key


@dataclass(frozen=True)
class Access:
    """Limits of a server.

    Attributes:
        key: every request but `/health` must carry it; None: no key.
        save_dirs: `/save_weights` writes below these folders only.
    """

    key: str | None = None
    save_dirs: tuple[Path, ...] = ()

    def check_place(self, path: Path) -> Path:
        """Return the folder that is written, without links. Raise EngineError if the server may not write there."""
        try:
            place = path.resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise EngineError(f"{path} cannot be written ({error})") from error
        if not any(place.is_relative_to(folder.resolve()) for folder in self.save_dirs):
            named = ", ".join(map(str, self.save_dirs)) or "none"
            raise EngineError(
                f"{path} is not below a folder in which this server may write ({named}): start it with --save-dir"
            )
        return place


class RequireKey:
    """ASGI middleware: a request without the key gets status 401, before its body is read."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._wanted = key_headers(key)["Authorization"].encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            if len(given) != 1 or not secrets.compare_digest(given[0], self._wanted):
                message = "this server wants its API key: Authorization: Bearer KEY"
                refusal = JSONResponse({"success": False, "message": message, "error": {"message": message}}, 401)
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)
