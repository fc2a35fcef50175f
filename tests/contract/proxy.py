"""An HTTP proxy in front of an engine. A test can change its requests and responses."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any, Self

import httpx

from tests.http_server import ThreadedServer

Body = dict[str, Any] | None
Tamper = Callable[[str, Body], "Body | Answer"]


class Answer(dict[str, Any]):
    """A response of the proxy itself, with status 200. The request is not sent to the engine."""


class Proxy:
    """A proxy on loopback.

    `tamper(path, body)` returns the body to send to the engine, or an `Answer`. `edit(path, answer)` returns the
    response for the client.
    """

    def __init__(self, target: str) -> None:
        self.tamper: Tamper = lambda path, body: body
        self.edit: Callable[[str, Any], Any] = lambda path, answer: answer
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._pass_on("GET", None)

            def do_POST(self) -> None:
                self._pass_on("POST", json.loads(self.rfile.read(int(self.headers["content-length"])) or b"{}"))

            def log_message(self, *_: Any) -> None:
                pass

            def _pass_on(self, method: str, body: Body) -> None:
                status, content = 200, proxy.tamper(self.path, body)
                if not isinstance(content, Answer):
                    answer = httpx.request(method, target + self.path, json=content, timeout=120, trust_env=False)
                    status = answer.status_code
                    content = answer.json() if "json" in answer.headers.get("content-type", "") else {}
                payload = json.dumps(proxy.edit(self.path, content)).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

        self._server = ThreadedServer(Handler)
        self.url = self._server.url
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
