"""EnginePool, sample_groups and EmbeddedServers work with real server processes."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import Qwen3ForCausalLM

from megatron_rl.config import RolloutConfig
from megatron_rl.engines import health
from megatron_rl.engines.pool import EnginePool, GenerationInterrupted, GenerationRequest, Sample, SamplingParams
from megatron_rl.engines.processes import server_process as processes
from megatron_rl.engines.processes.embedded import EmbeddedServers
from megatron_rl.errors import EngineError, UserError
from megatron_rl.sampling.group import sample_groups
from megatron_rl.types import Prompt
from tests.contract.conftest import VOCAB, logp_of, start_servers
from tests.contract.proxy import Body, Proxy

PROMPT = (5, 17, 250, 99, 3)


@pytest.fixture
def pool(url: str) -> Iterator[EnginePool]:
    with EnginePool([url], timeout_s=60) as pool:
        yield pool


@pytest.fixture
def two(model_dir: Path, tmp_path: Path) -> Iterator[EmbeddedServers]:
    """Yield two servers for one test, which may kill them."""
    with EmbeddedServers(model_dir, tmp_path / "logs", count=2, threads=1, deterministic=True) as servers:
        yield servers


def requests(count: int, tokens: int, n: int = 2) -> list[GenerationRequest]:
    return [
        GenerationRequest(f"q{at}", (2 + at, 3), n, SamplingParams(tokens, ignore_eos=True, seed=at))
        for at in range(count)
    ]


def kill_after(seconds: float, pids: tuple[int, ...]) -> threading.Timer:
    timer = threading.Timer(seconds, lambda: [os.kill(pid, signal.SIGKILL) for pid in pids])
    timer.start()
    return timer


def one(pool: EnginePool, **sampling: object) -> Sample:
    params = SamplingParams(**{"max_new_tokens": 8, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
    return pool.generate([GenerationRequest("one", PROMPT, 1, params)])[0][0]


def test_results_keep_the_order_of_the_requests(pool: EnginePool) -> None:
    asked = [
        GenerationRequest(f"o{at}", PROMPT, 1 + at % 3, SamplingParams(1 + (7 * at) % 11, ignore_eos=True))
        for at in range(30)
    ]
    answers = pool.generate(asked)
    assert [len(samples) for samples in answers] == [request.n for request in asked]
    assert [len(samples[0].tokens) for samples in answers] == [request.sampling.max_new_tokens for request in asked]


def test_a_sample_carries_tokens_log_probs_and_versions(pool: EnginePool, model: Qwen3ForCausalLM) -> None:
    sample = one(pool)
    assert sample.finish_reason == "length"
    assert sample.columns["versions"].tolist() == [0] * 8
    want = logp_of(model, list(PROMPT), list(sample.tokens))
    assert sample.logmu is not None
    torch.testing.assert_close(torch.from_numpy(sample.logmu), want, atol=1e-4, rtol=0)


def test_a_refused_request_is_one_error_with_the_servers_words(pool: EnginePool) -> None:
    with pytest.raises(EngineError, match=r"refused the request \(400\): .*top_p"):
        pool.generate([*requests(4, 50), GenerationRequest("bad", PROMPT, 1, SamplingParams(4, top_p=2.0))])
    assert one(pool).finish_reason == "length"


def test_a_token_outside_the_vocabulary_is_refused(pool: EnginePool, embedded_only: None) -> None:
    with pytest.raises(EngineError, match=r"refused.*input_ids.*outside the vocabulary"):
        pool.generate([GenerationRequest("bad", (VOCAB,), 1, SamplingParams(4))])


def test_request_ids_must_differ(pool: EnginePool) -> None:
    with pytest.raises(UserError, match="q0"):
        pool.generate(requests(1, 2) * 2)


def flush_soon(pool: EnginePool, url: str) -> None:
    """Flush the cache within 6 s. The server refuses while a sample still runs."""
    end = time.monotonic() + 6.0
    while True:
        try:
            return pool.flush(url)
        except EngineError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)


def test_interrupting_raises_at_once_and_aborts_on_the_engine(pool: EnginePool, url: str) -> None:
    threading.Timer(0.4, pool.interrupt).start()
    began = time.monotonic()
    with pytest.raises(GenerationInterrupted):
        pool.generate(requests(3, 1900))
    assert time.monotonic() - began < 5
    flush_soon(pool, url)


def test_an_interrupt_without_a_running_call_has_no_effect(pool: EnginePool) -> None:
    pool.interrupt()
    assert one(pool).finish_reason == "length"


def test_a_server_killed_while_generating_costs_no_prompt(two: EmbeddedServers) -> None:
    with EnginePool(two.urls, timeout_s=60) as pool:
        asked = requests(12, 60)
        calm = pool.generate(asked)
        killer = kill_after(0.15, two.pids[:1])
        answers = pool.generate(asked)
        killer.join()
        # The servers are deterministic and every request has a seed, so redone samples are equal.
        assert [[sample.tokens.tolist() for sample in samples] for samples in answers] == [
            [sample.tokens.tolist() for sample in samples] for samples in calm
        ]
        assert len(pool.generate(requests(3, 4))) == 3
        assert pool.live_urls == two.urls[1:]
        kill_after(0.2, two.pids[1:])
        with pytest.raises(EngineError, match="no engine is left") as caught:
            pool.generate(requests(8, 1500))
        assert all(url in str(caught.value) for url in two.urls)
        assert pool.live_urls == ()


def test_a_server_that_hangs_is_dropped_at_the_time_out(url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts connections, but no process answers
        hanging = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with EnginePool([hanging, url], timeout_s=5.0) as pool:
            assert [len(samples) for samples in pool.generate(requests(4, 10))] == [2] * 4
            assert pool.live_urls == (url,)


def test_stopping_ends_the_own_servers_and_no_other(
    model_dir: Path, tmp_path: Path, url: str, embedded_only: None
) -> None:
    servers = EmbeddedServers(model_dir, tmp_path, threads=1).start()
    pids = servers.pids
    assert os.getsid(pids[0]) != os.getsid(0), "a terminal's Ctrl-C would reach the server"
    servers.stop()
    servers.stop()
    assert servers.urls == ()
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
    with EnginePool([url]) as pool:
        pool.wait_healthy(5)


def test_a_server_that_cannot_start_is_an_error_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"(?s)ended with code 2.*no config\.json"):
        EmbeddedServers(tmp_path / "nothing", tmp_path / "logs").start()


def test_a_port_that_another_engine_has_taken_meanwhile_is_left_to_it(
    engine: str, url: str, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other engine is healthy, and would get this pool's weights if its port were used."""
    free = processes.free_port
    ports = [int(url.rpartition(":")[2])]
    monkeypatch.setattr(processes, "free_port", lambda: ports.pop() if ports else free())
    with start_servers(engine, model_dir, tmp_path) as servers, EnginePool(servers.urls) as pool:
        assert not ports and servers.urls[0] != url
        assert one(pool).finish_reason == "length"
    assert processes._PORT_TAKEN.search((tmp_path / "server-0.log").read_text())


def test_servers_die_with_the_process_that_started_them(engine: str, model_dir: Path, tmp_path: Path) -> None:
    """All processes of a server end: SGLang has a scheduler, a detokenizer and helpers."""
    program = (
        "import os, sys, psutil, conftest\n"
        "from pathlib import Path\n"
        f"servers = conftest.start_servers({engine!r}, Path({str(model_dir)!r}), Path({str(tmp_path)!r})).start()\n"
        "print(*[p.pid for p in psutil.Process().children(recursive=True)], flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])])}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, check=False, timeout=300
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) >= (4 if engine == "sglang" else 1), done.stderr
    left = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    for process in (outlived := psutil.wait_procs(left, timeout=10)[1]):
        process.kill()
    assert not outlived, "servers outlived their parent"


def test_waiting_for_a_server_that_is_not_there_names_it() -> None:
    with EnginePool(["http://127.0.0.1:9"]) as pool, pytest.raises(EngineError, match=r"127\.0\.0\.1:9"):
        pool.wait_healthy(0.3)


def test_control_calls_reach_the_server(pool: EnginePool, url: str, model: Qwen3ForCausalLM) -> None:
    assert pool.weight_version(url) == "0"
    fused = {name.rsplit(".", 2)[0] for name in pool.checksums(url)}
    assert {name.rsplit(".", 2)[0] for name in model.state_dict()} <= fused | {"lm_head"}
    pool.pause(url, "retract")
    pool.flush(url)
    pool.resume(url)
    with pytest.raises(EngineError, match="nowhere"):
        pool.update_weights_from_disk(url, Path("nowhere"), 1)
    with pytest.raises(EngineError, match="not an engine of this pool"):
        pool.resume("http://127.0.0.1:9")


def test_a_lost_server_that_answers_again_waits_for_its_weights(pool: EnginePool, url: str) -> None:
    pool.mark_lost(url, "it was restarted, say")
    assert pool.recover_lost() == (url,) and pool.live_urls == (url,) and "restarted, say" in pool.quarantined[url]
    pool.admit(url, 0)
    assert one(pool).finish_reason == "length"


def test_a_server_that_somebody_left_paused_goes_on(pool: EnginePool, url: str) -> None:
    pool.pause(url, "abort")
    with EnginePool([url]) as another:
        another.wait_healthy(60, wake=True)
        assert one(another).finish_reason == "length"


def test_a_server_that_is_slow_to_answer_is_not_taken_for_dead(
    url: str, embedded_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may miss one health check. It is lost after three in a row, or after a refused connection."""
    monkeypatch.setattr(health, "HEALTH_S", 3.0)
    slow, looks = [2], []

    def tamper(path: str, body: Body) -> Body:
        if path == "/model_info":
            looks.append(path)
            if len(looks) <= slow[0]:
                time.sleep(4)
        return body

    with Proxy(url) as proxy, EnginePool([proxy.url]) as pool:
        proxy.tamper = tamper  # type: ignore[assignment]
        pool.find_lost()
        assert len(looks) == 3 and pool.live_urls == (proxy.url,)
        looks.clear()
        slow[0] = 3
        pool.find_lost()
        assert len(looks) == 3 and pool.live_urls == ()
    with EnginePool(["http://127.0.0.1:9"]) as pool:
        began = time.monotonic()
        pool.find_lost()
        assert pool.live_urls == () and time.monotonic() - began < health.HEALTH_S


def test_a_dropped_server_gets_no_request(pool: EnginePool, url: str) -> None:
    pool.mark_lost(url, "it serves other weights")
    with pytest.raises(EngineError, match="it serves other weights"):
        one(pool)


# Groups of trajectories --------------------------------------------------------------------------------------

ROLLOUT = RolloutConfig(samples_per_prompt=3, max_new_tokens=10, max_prompt_tokens=8)
PROMPTS = [Prompt(f"p{at}", "", tuple(range(2 + at, 5 + 2 * at)), "") for at in range(4)]


def test_groups_are_numbered_and_carry_behavior_log_probs(pool: EnginePool, model: Qwen3ForCausalLM) -> None:
    found = sample_groups(
        pool, PROMPTS, ROLLOUT, first_id=100, first_group=20, seed=1, stop_token_ids=(7, 8), need_logmu=True
    )
    assert [trajectory.id for trajectory in found] == list(range(100, 112))
    assert [trajectory.group for trajectory in found] == [20 + at // 3 for at in range(12)]
    for trajectory in found:
        prompt = PROMPTS[trajectory.group - 20]
        assert (trajectory.prompt_id, tuple(trajectory.prompt_tokens)) == (prompt.id, prompt.tokens)
        assert trajectory.logmu is not None
        want = logp_of(model, list(prompt.tokens), list(trajectory.response_tokens))
        torch.testing.assert_close(torch.from_numpy(trajectory.logmu), want, atol=1e-4, rtol=0)
        ends = [at for at, token in enumerate(trajectory.response_tokens) if token in (1, 7, 8)]
        assert ends == ([len(trajectory.response_tokens) - 1] if trajectory.finish_reason == "stop" else [])


def test_trajectories_carry_the_likeliest_tokens_when_asked_for(pool: EnginePool, model: Qwen3ForCausalLM) -> None:
    found = sample_groups(
        pool, PROMPTS, ROLLOUT, first_id=0, first_group=0, seed=1, stop_token_ids=(7, 8), need_logmu=False, topk=6
    )
    for trajectory in found:
        assert trajectory.logmu is not None
        ids_RK, logmu_RK = trajectory.columns["topk_ids"], trajectory.columns["topk_logmu"]
        length = len(trajectory.response_tokens)
        assert (ids_RK.dtype.name, ids_RK.shape, logmu_RK.dtype.name, logmu_RK.shape) == (
            "int32",
            (length, 6),
            "float32",
            (length, 6),
        )
        for at in (0, length - 1):
            seen = [*trajectory.prompt_tokens, *trajectory.response_tokens[:at]]
            with torch.no_grad():
                want = torch.log_softmax(model(torch.tensor([seen])).logits[0, -1].float(), -1).topk(6)
            assert ids_RK[at].tolist() == want.indices.tolist()
            torch.testing.assert_close(torch.from_numpy(logmu_RK[at]), want.values, atol=1e-4, rtol=0)


def test_more_top_log_probs_than_a_server_gives_are_refused(pool: EnginePool, embedded_only: None) -> None:
    with pytest.raises(EngineError, match="top_logprobs_num"):
        sample_groups(
            pool, PROMPTS, ROLLOUT, first_id=0, first_group=0, seed=1, stop_token_ids=(), need_logmu=True, topk=65
        )


def test_the_seed_fixes_the_trajectories_and_their_ids_vary_them(pool: EnginePool, embedded_only: None) -> None:
    def tokens(seed: int, first_id: int) -> list[list[int]]:
        found = sample_groups(
            pool, PROMPTS, ROLLOUT, first_id=first_id, first_group=0, seed=seed, stop_token_ids=(), need_logmu=False
        )
        assert all(trajectory.logmu is None for trajectory in found)
        return [trajectory.response_tokens.tolist() for trajectory in found]

    first = tokens(1, 0)
    assert tokens(1, 0) == first
    assert tokens(2, 0) != first
    assert tokens(1, 12) != first


def test_evaluation_may_override_temperature_and_number_of_samples(pool: EnginePool) -> None:
    found = sample_groups(
        pool,
        PROMPTS,
        ROLLOUT,
        first_id=0,
        first_group=0,
        seed=1,
        stop_token_ids=(),
        need_logmu=False,
        temperature=0.0,
        samples=2,
    )
    assert [a.response_tokens.tolist() for a in found[::2]] == [b.response_tokens.tolist() for b in found[1::2]]


@pytest.mark.parametrize(("tokens", "match"), [((), "'odd' has no tokens"), (tuple(range(9)), "'odd' has 9 tokens")])
def test_a_prompt_that_cannot_be_sampled_is_named(pool: EnginePool, tokens: tuple[int, ...], match: str) -> None:
    bad = Prompt("odd", "", tokens, "")
    with pytest.raises(UserError, match=match):
        sample_groups(
            pool, [*PROMPTS, bad], ROLLOUT, first_id=0, first_group=0, seed=1, stop_token_ids=(), need_logmu=False
        )
