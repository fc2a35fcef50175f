"""If a trainer is killed inside a weight update, the resumed run updates the paused engines and loses no step."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from megatron_rl.config import load_config
from megatron_rl.engines.processes.own_servers import own_servers
from megatron_rl.ports import free_port
from megatron_rl.precision.plan import resolve
from tests.contract.proxy import Answer, Body, Proxy
from tests.e2e.command import Command, records
from tests.e2e.conftest import version_of
from tests.e2e.test_sglang import SGLANG, without_sglang

STEPS, STRUCK = 6, 3  # the trainer is killed in the update to this version
LAST_CALL = {
    "disk": "/update_weights_from_disk",
    "distributed": "/end_weight_update",
    "tensor": "/end_weight_update",
}


class Struck:
    """A proxy hook that calls `strike` at the last request of the update to version STRUCK and drops that request."""

    def __init__(self, proxy: Proxy, transport: str) -> None:
        self.strike: Callable[[], None] | None = None
        self.updates, self._path = 0, LAST_CALL[transport]
        proxy.tamper = self

    def __call__(self, path: str, body: Body) -> Body | Answer:
        if path != self._path or self.strike is None:
            return body
        self.updates += 1
        if self.updates < STRUCK:
            return body
        strike, self.strike = self.strike, None
        strike()
        return Answer(success=True)


def assert_resumes_whole(
    url: str, proxy: Proxy, arguments: list[object], victim: str, start, cli, run_folder: Path
) -> None:
    """Kill a trainer inside a weight update, resume the run, and check that it has every step once.

    Args:
        url: URL of the server itself.
        proxy: proxy in front of the server; the trainer uses it.
        arguments: arguments of `train`; the last one is the transport.
        victim: the process that is killed, `rank` or `launcher`.
        start: fixture that starts a command.
        cli: fixture that runs a command.
        run_folder: the run folder.
    """
    struck = Struck(proxy, str(arguments[-1]).rpartition("=")[2])
    command: Command = start("train", *arguments)

    def kill() -> None:
        rank = command.rank(0)
        (rank if victim == "rank" else command.process).kill()
        end = time.monotonic() + 20
        while lives(rank):
            assert time.monotonic() < end, "the rank outlived its launcher"
            time.sleep(0.01)

    struck.strike = kill
    command.process.wait(300)
    command.until_gone(lambda: [p for p in command.members() if p.name() != "torch_shm_manager"])
    assert struck.updates == STRUCK and command.process.returncode != 0
    known = len(records(run_folder))
    assert known == STRUCK - 2, "the run begins with version 1, and a step is noted once its weights are out"
    with pytest.raises(httpx.TimeoutException):
        generate(url, timeout=2)
    result = cli("train", *arguments, "--resume")
    assert result.code == 0, result.all
    assert [r["step"] for r in records(run_folder)] == list(range(STEPS)), "every step once"
    assert version_of(url) == str(STEPS + 1)
    generate(url, timeout=60)
    # The first update of every step shows that the engine samples from the trainer's weights.
    assert all(abs(r["mismatch/ratio/max"] - 1) < 1e-4 for r in records(run_folder))


def lives(process: psutil.Process) -> bool:
    """Return whether the process exists and is not a zombie."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def generate(url: str, timeout: float) -> None:
    """Generate one token. A paused engine accepts the request and does not respond."""
    body = {"input_ids": [2, 3], "sampling_params": {"max_new_tokens": 1}}
    httpx.post(f"{url}/generate", json=body, timeout=timeout, trust_env=False).raise_for_status()


@pytest.mark.parametrize(("transport", "victim"), [("disk", "launcher"), ("distributed", "rank"), ("tensor", "rank")])
def test_a_trainer_killed_inside_a_weight_update(
    transport: str, victim: str, start, cli, small_run, run_folder, arithmetic_model
):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = start("serve", "--model", str(arithmetic_model), "--port", str(port), "--threads", "1")
    server.until(lambda: version_of(url))
    with Proxy(url) as proxy:
        arguments = [small_run, f"run.steps={STEPS}", f"rollout.urls=[{proxy.url}]", f"rollout.transport={transport}"]
        assert_resumes_whole(url, proxy, arguments, victim, start, cli, run_folder)
    server.interrupt()
    server.wait()


@pytest.fixture
def sglang_url(small_run: Path, tmp_path: Path) -> Iterator[str]:
    """The URL of an SGLang server that the run did not start."""
    config = load_config(small_run, [*SGLANG, "run.name=servers", f"run.dir={tmp_path}"])
    servers = own_servers(config, resolve(config.precision, 2, engine="sglang", device="cpu"), "cpu", 300)
    servers.keyed = False  # the test sends requests of its own
    with servers:
        yield servers.urls[0]


@without_sglang
def test_a_trainer_killed_inside_a_weight_update_of_sglang(start, cli, small_run, run_folder, sglang_url: str):
    """SGLang stays paused with half of an update, and responds to no health check until it is resumed."""
    with Proxy(sglang_url) as proxy:
        arguments = [
            small_run,
            *SGLANG,
            f"run.steps={STEPS}",
            f"rollout.urls=[{proxy.url}]",
            "rollout.transport=distributed",
        ]
        assert_resumes_whole(sglang_url, proxy, arguments, "rank", start, cli, run_folder)
