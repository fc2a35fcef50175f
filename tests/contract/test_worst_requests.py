"""Joins of update groups that hang hold up no other call. They keep threads for a minute, so the server is its own."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.contract.test_engine_requests import assert_serves, post


@pytest.fixture
def own_api(model_dir: Path, tmp_path: Path) -> Iterator[httpx.Client]:
    """A client of a server that ends with the test."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "megatron_rl", "serve", "--model", str(model_dir), "--port", str(port)]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
                deadline = time.monotonic() + 120
                while time.monotonic() < deadline:
                    try:
                        if client.get("/health").status_code == 200:
                            break
                    except httpx.ConnectError:
                        time.sleep(0.2)
                yield client
        finally:
            server.kill()


@pytest.fixture
def mute() -> Iterator[int]:
    """Yield the port of a listener that accepts connections and never responds."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield silent.getsockname()[1]


def test_joins_that_hang_hold_up_no_other_call(own_api: httpx.Client, mute: int) -> None:
    join = {"master_address": "127.0.0.1", "master_port": mute, "rank_offset": 1, "world_size": 2, "backend": "gloo"}

    def hang(at: int) -> None:
        with (
            httpx.Client(base_url=own_api.base_url, trust_env=False, timeout=2.0) as client,
            pytest.raises(httpx.ReadTimeout),
        ):
            client.post("/init_weights_update_group", json={**join, "group_name": f"g{at}"})

    with ThreadPoolExecutor(8) as threads:
        hanging = [threads.submit(hang, at) for at in range(8)]
        time.sleep(0.5)
        for path, body in (
            ("/pause_generation", {"mode": "abort"}),
            ("/continue_generation", {}),
            ("/abort_request", {"abort_all": True}),
            ("/weights_checker", {"action": "checksum"}),
        ):
            assert post(own_api, path, body, timeout=10).status_code == 200
        assert_serves(own_api)
        for future in hanging:
            future.result()
