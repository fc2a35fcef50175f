"""An HTTP server whose responses a test chooses, to see what the client makes of them."""

import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from tests.http_server import ThreadedServer


class Reply(NamedTuple):
    """A response: JSON data or bytes, status and headers."""

    body: Any = None
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})


Respond = Callable[[str, dict[str, Any]], Reply]


def right_samples(body: dict[str, Any]) -> Any:
    """Return the right response to a /generate request, with the tokens 7 and 8 in each sample."""
    rid, n, prompt = body["rid"], body["sampling_params"]["n"], body["input_ids"]
    samples = []
    for at in range(n):
        meta = {
            "id": rid if n == 1 else f"{rid}-{at}",
            "prompt_tokens": len(prompt),
            "finish_reason": {"type": "length"},
            "weight_versions": [{"version": "0", "start": 0, "end": 2}],
            "output_token_logprobs": [[-0.5, 7, None], [-0.5, 8, None]],
            "output_top_logprobs": [[[-0.5, 7, None], [-1.5, 8, None]]] * 2,
        }
        samples.append({"output_ids": [7, 8], "meta_info": meta})
    return samples[0] if n == 1 else samples


class ScriptedServer:
    """A server on loopback that is healthy. `respond(path, body)` returns the response to every other call.

    Attributes:
        url: its base URL.
        asked: paths of the calls so far, health checks excepted.
        respond: may be replaced at any time.
    """

    def __init__(self, respond: Respond | None = None) -> None:
        self.respond: Respond = respond or (lambda path, body: Reply(right_samples(body)))
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply({})

            def do_POST(self) -> None:
                self._reply(json.loads(self.rfile.read(int(self.headers["content-length"])) or b"{}"))

            def log_message(self, *_: Any) -> None:
                pass

            def _reply(self, body: dict[str, Any]) -> None:
                if self.path in ("/health", "/abort_request"):
                    reply = Reply({})
                else:
                    server.asked.append(self.path)
                    reply = server.respond(self.path, body)
                content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                self.send_response(reply.status)
                for name, value in {"content-length": str(len(content)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadedServer(Handler)
        self.url = self._server.url
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
