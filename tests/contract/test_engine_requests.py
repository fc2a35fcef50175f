"""No request ends the embedded server, holds it up, or gets a response that says nothing."""

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_rl.protocol.generation import error_message
from megatron_rl.server import http_limits
from megatron_rl.server.app import create_app
from megatron_rl.server.engine import Engine
from tests.cases.engine_requests import BAD_REQUESTS, BadRequest

JSON = {"content-type": "application/json"}


def post(api: httpx.Client, path: str, body: Any, **more: Any) -> httpx.Response:
    if isinstance(body, bytes):
        return api.post(path, content=body, headers=JSON, **more)
    return api.post(path, json=body, **more)


def assert_serves(api: httpx.Client) -> None:
    """Assert that the server is healthy and generates."""
    assert api.get("/health").status_code == 200
    answer = api.post("/generate", json={"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 1}})
    assert len(answer.json()["output_ids"]) == 1


@pytest.mark.parametrize("case", BAD_REQUESTS, ids=lambda case: case.name)
def test_a_bad_request_is_refused_in_words_and_the_server_serves_as_before(
    api: httpx.Client, embedded_only: None, case: BadRequest
) -> None:
    body = case.body if isinstance(case.body, bytes) else _ascii_json(case.body)
    began = time.monotonic()
    answer = post(api, case.path, body)
    assert (answer.status_code, answer.json()["success"]) == (case.status, False), answer.text[:300]
    assert case.words in error_message(answer) and len(answer.content) < 5000
    assert time.monotonic() - began < 20
    assert_serves(api)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_page_in_a_browser_may_send_to_loopback_is_refused(
    api: httpx.Client, embedded_only: None, kind: str
) -> None:
    for path in ("/generate", "/pause_generation"):
        body = _ascii_json({"input_ids": [5]} if path == "/generate" else {})
        answer = api.post(path, content=body, headers={"content-type": kind} if kind else {})
        assert (answer.status_code, answer.json()["success"]) == (400, False)
    assert_serves(api)


def _ascii_json(body: Any) -> bytes:
    """Return JSON in which half characters are escaped, as a client may send them."""
    return json.dumps(body).encode()


def test_the_largest_allowed_request_holds_nothing_up(api: httpx.Client, embedded_only: None) -> None:
    """Its samples end one after the other. Counting those that are left must not cost the square of their number."""
    body = {"input_ids": [5], "sampling_params": {"n": 4096, "max_new_tokens": 2, "ignore_eos": True}}
    began = time.monotonic()
    assert len(post(api, "/generate", body).json()) == 4096
    assert time.monotonic() - began < 60


def test_a_request_whose_client_left_is_aborted_at_once(api: httpx.Client, embedded_only: None) -> None:
    body = {"input_ids": [5], "sampling_params": {"n": 2048, "max_new_tokens": 1500, "ignore_eos": True}}
    with pytest.raises(httpx.ReadTimeout):
        post(api, "/generate", body, timeout=1.0)
    began = time.monotonic()
    assert_serves(api)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("path", ["/update_weights_from_disk", "/save_weights"])
def test_a_pipe_in_place_of_a_file_of_weights_is_refused(
    api: httpx.Client, embedded_only: None, path: str, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    key = {"model_path": str(tmp_path), "weight_version": "1"} if "update" in path else {"path": str(tmp_path)}
    answer = post(api, path, key, timeout=20)
    assert answer.status_code == 400 and "is not a regular file" in error_message(answer)
    assert_serves(api)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 66), 1 << 66)
    | st.sampled_from([0, 1, -1, 2, 299, 300, 4096, 1 << 31, 1 << 63])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["\0", "\ud800", "a" * 300, "g", "abort", "default", "float32", "/tmp/\0"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SAMPLING = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(0, 3)},
    optional=dict.fromkeys(
        ("temperature", "top_p", "top_k", "n", "stop_token_ids", "ignore_eos", "sampling_seed", "junk"), JUNK
    ),
)
GENERATE = st.fixed_dictionaries(
    {"input_ids": st.just([5, 6]) | st.just([[5], [6, 7]]) | JUNK},
    optional={
        "sampling_params": SAMPLING | JUNK,
        "return_logprob": st.booleans() | JUNK,
        "logprob_start_len": st.integers(-1, 3) | JUNK,
        "top_logprobs_num": st.integers(0, 4) | JUNK,
        "return_prompt_token_ids": st.booleans() | JUNK,
        "return_routed_experts": JUNK,
        "rid": JUNK,
        "stream": JUNK,
    },
)
_FIELDS = {
    "/pause_generation": ("mode",),
    "/abort_request": ("rid", "abort_all"),
    "/flush_cache": (),
    "/update_weights_from_disk": ("model_path", "weight_version", "flush_cache"),
    "/begin_weight_update": ("selector",),
    "/abort_weight_update": (),
    "/update_weights_from_distributed": ("names", "dtypes", "shapes", "group_name", "load_format", "weight_version"),
    "/update_weights_from_tensor": ("serialized_named_tensors", "flush_cache"),
    "/destroy_weights_update_group": ("group_name",),
    "/weights_checker": ("action",),
    "/continue_generation": (),
}
CONTROL = st.sampled_from(sorted(_FIELDS)).flatmap(
    lambda path: st.tuples(st.just(path), st.fixed_dictionaries({}, optional=dict.fromkeys(_FIELDS[path], JUNK)))
)
CALLS = st.tuples(st.just("/generate"), GENERATE) | CONTROL


def test_whatever_is_sent_the_server_responds_in_json_and_stays_healthy(api: httpx.Client, embedded_only: None) -> None:
    """A drawn request is sent, then the health is checked. The time is bounded, so a slow machine tries fewer."""
    end = time.monotonic() + 12

    @settings(
        max_examples=400,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(CALLS)
    def respond(call: tuple[str, Any]) -> None:
        if time.monotonic() > end:
            return
        path, body = call
        answer = api.post(path, content=_ascii_json(body), headers=JSON, timeout=20)
        assert answer.status_code in (200, 400), (path, body, answer.text[:300])
        assert answer.json() is not None
        assert api.get("/health").status_code == 200, (path, body)
        if path == "/pause_generation":
            api.post("/continue_generation", json={})

    try:
        respond()
    finally:
        api.post("/continue_generation", json={})
        api.post("/abort_weight_update", json={})
    assert_serves(api)


def test_a_half_request_is_closed_in_time(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header, or the body, never ends. A server in this process has shorter limits."""
    monkeypatch.setattr(http_limits, "HEADER_S", 1.0)
    monkeypatch.setattr(http_limits, "BODY_S", 1.0)
    engine = Engine(model_dir).start()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(create_app(engine), http=http_limits.TimedProtocol, log_level="error", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            address = listening.getsockname()
            head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            for sent, received in (
                (b"", b""),
                (head, b""),
                (head + b"content-length: 100\r\n\r\n{", b"HTTP/1.1 408"),
                (head + b"content-length: 2\r\n\r\n{}", b"HTTP/1.1 400"),
            ):
                with socket.create_connection(address, timeout=20) as client:
                    client.sendall(sent)
                    assert client.recv(12)[:12] == received
        finally:
            server.should_exit = True
            thread.join()
            engine.stop()
