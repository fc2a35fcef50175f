"""With sglang-router in front of SGLang, all generation goes through the router, and control calls do not."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from transformers import Qwen3ForCausalLM

from megatron_rl.engines.pool import EnginePool, GenerationRequest, SamplingParams
from megatron_rl.engines.processes.embedded import EmbeddedServers
from megatron_rl.engines.processes.server_process import ServerProcess
from megatron_rl.engines.processes.sglang import start_router
from megatron_rl.errors import EngineError
from megatron_rl.supervise import end_sessions
from tests.contract.conftest import SGLANG, logp_of

PROMPT = (5, 17, 250, 99, 3)


@pytest.fixture(scope="module")
def other(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServers]:
    """Yield a second server behind the router. It refuses the router's requests, so each request that it gets fails."""
    with EmbeddedServers(model_dir, tmp_path_factory.mktemp("logs"), threads=1) as servers:
        yield servers


@pytest.fixture(scope="module")
def router(url: str, other: EmbeddedServers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    process = start_router([url, *other.urls], tmp_path_factory.mktemp("router") / "router.log", SGLANG, "cpu")
    try:
        process.await_health(120, time.monotonic() + 120)
        yield process
    finally:
        end_sessions([process.process])


@pytest.fixture
def pool(sglang_only: None, url: str, other: EmbeddedServers, router: ServerProcess) -> Iterator[EnginePool]:
    with EnginePool([url, *other.urls], 60, router.url) as pool:
        yield pool


def requests(count: int) -> list[GenerationRequest]:
    return [GenerationRequest(f"r{at}", PROMPT, 2, SamplingParams(6, ignore_eos=True)) for at in range(count)]


def workers(router: ServerProcess) -> set[str]:
    return {
        worker["url"] for worker in httpx.get(f"{router.url}/workers", timeout=60, trust_env=False).json()["workers"]
    }


def test_requests_go_through_the_router_to_engines_that_may_be_used(
    pool: EnginePool, router: ServerProcess, url: str, other: EmbeddedServers, model: Qwen3ForCausalLM
) -> None:
    with pytest.raises(EngineError, match=f"{router.url}/generate refused .*not supported by the embedded engine"):
        pool.generate(requests(4))
    pool.quarantine(other.urls[0], "it serves an older version")
    for samples in pool.generate(requests(8)):
        for sample in samples:
            assert sample.logmu is not None and len(sample.tokens) == 6
            want = logp_of(model, list(PROMPT), list(sample.tokens))
            torch.testing.assert_close(torch.from_numpy(sample.logmu), want, atol=1e-4, rtol=0)
    assert workers(router) == {url}
    pool.admit(other.urls[0], 0)
    with pytest.raises(EngineError, match="not supported by the embedded engine"):
        pool.generate(requests(4))
    assert workers(router) == {url, *other.urls}


def test_an_engine_that_dies_behind_the_router_is_dropped_and_its_requests_are_redone(
    pool: EnginePool, router: ServerProcess, url: str, other: EmbeddedServers
) -> None:
    """The module's second server has ended after this test."""
    os.kill(other.pids[0], signal.SIGKILL)
    assert [len(samples) for samples in pool.generate(requests(6))] == [2] * 6
    assert pool.live_urls == (url,) and workers(router) == {url}


def test_without_its_router_the_pool_generates_nothing_and_names_it(
    pool: EnginePool, router: ServerProcess, url: str, other: EmbeddedServers
) -> None:
    """This test must be the last one of the module."""
    pool.mark_lost(other.urls[0], "it is gone")
    pool.generate(requests(1))
    end_sessions([router.process])
    with pytest.raises(EngineError, match=rf"sglang-router at {router.url} is gone \(ConnectError.*router: false"):
        pool.generate(requests(1))
    assert pool.weight_version(url) == "0", "control goes to the engines directly"
