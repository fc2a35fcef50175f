"""Engines that die are done without, as long as one lives; engines that belong to somebody else are left alone."""

import socket
import time

import httpx
import psutil
import pytest

from tests.e2e.command import Command, records

TRAJECTORIES = 8 * 16


def url_of(server: psutil.Process) -> str:
    arguments = server.cmdline()
    return f"http://127.0.0.1:{arguments[arguments.index('--port') + 1]}"


def assert_whole_steps(run, steps: int) -> None:
    """Each step was trained once, on every trajectory it was to have."""
    found = records(run)
    assert [r["step"] for r in found] == list(range(steps))
    for record in found:
        assert round(record["tokens/response"] / record["response_length/mean"]) == TRAJECTORIES
        rewarded = record["reward/mean"] * TRAJECTORIES
        assert abs(rewarded - round(rewarded)) < 1e-3


@pytest.mark.parametrize("victim", [0, 1])
def test_a_run_goes_on_without_a_server_that_was_killed(start, small_run, run_folder, victim):
    steps = 30
    command: Command = start("train", small_run, f"run.steps={steps}", "rollout.servers=2", "run.save_every=0")
    command.until(lambda: len(records(run_folder)) >= 2)
    dead = sorted(command.servers(), key=lambda server: server.pid)[victim]
    url = url_of(dead)
    dead.kill()
    before = len(records(run_folder))
    result = command.wait()
    assert result.code == 0, result.all
    assert before < steps - 1, "the server was killed too late to matter"
    assert_whole_steps(run_folder, steps)
    assert result.err.count(f"engine {url} is not used any more") == 1, result.err


def test_a_run_without_any_server_left_ends_with_one_clear_error(start, small_run, run_folder):
    command: Command = start("train", small_run, "run.steps=500", "rollout.servers=2", "parallel.tensor=2", "run.save_every=0")
    command.until(lambda: len(records(run_folder)) >= 2)
    servers = command.servers()
    urls = [url_of(server) for server in servers]
    for server in servers:
        server.kill()
    result = command.wait(timeout=60)
    assert result.code == 2, result.all
    assert "Traceback" not in result.err
    errors = [line for line in result.err.splitlines() if line.startswith("EngineError: ")]
    assert len(errors) == 1 and result.err.rstrip().endswith(errors[0])
    assert len(urls) == 2 and all(url in errors[0] for url in urls)


def test_servers_given_by_url_are_used_and_left_running(start, cli, small_run, run_folder, arithmetic_model):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server: Command = start("serve", "--model", arithmetic_model, "--port", port, "--threads", 1)
    server.until(lambda: _answers(url))
    assert httpx.get(f"{url}/model_info", trust_env=False).json()["weight_version"] == "default"
    result = cli("train", small_run, f"rollout.urls=[{url}]", "run.steps=2")
    assert result.code == 0, result.all
    assert not (run_folder / "servers").exists(), "a server of our own was started"
    assert_whole_steps(run_folder, 2)
    assert server.process.poll() is None
    assert httpx.get(f"{url}/model_info", trust_env=False).json()["weight_version"] == "3"
    server.process.terminate()
    assert server.wait(timeout=30).code in (0, -15, 143)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False, timeout=2).status_code == 200
    except httpx.HTTPError:
        time.sleep(0.1)
        return False
