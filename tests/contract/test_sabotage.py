"""A weight update that fails is detected and reported, and no engine with wrong weights is used.

Two engines take part: an embedded one that works, and the engine of the suite behind a proxy that causes faults.
"""

import math
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rl.engines.control import Traits
from megatron_rl.engines.pool import EnginePool, GenerationRequest, SamplingParams
from megatron_rl.engines.processes.embedded import EmbeddedServers
from megatron_rl.errors import CheckpointError, EngineError
from megatron_rl.protocol.buckets import Bucket, TensorSlot
from megatron_rl.protocol.payload import pack_payload, shared_buffer, unpack_payload
from megatron_rl.weight_sync.confirmation import ScoreProbe
from megatron_rl.weight_sync.sync import WeightSync
from megatron_rl.weight_sync.transports import distributed
from megatron_rl.weight_sync.transports.disk import DiskTransport
from megatron_rl.weight_sync.transports.distributed import DistributedTransport
from megatron_rl.weight_sync.transports.tensor import TensorTransport
from megatron_rl.weight_sync.transports.transport import Transport
from megatron_rl.weights.hf_folder import HFFolder
from tests.contract.conftest import VOCAB, logp_of, start_servers
from tests.contract.proxy import Answer, Body, Proxy

BUCKET = 60_000  # bytes: several buckets even for the tiny model
TIMEOUT_S = 20.0
NORM = "model.layers.1.input_layernorm.weight"
OTHER_NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def honest(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServers]:
    with EmbeddedServers(model_dir, tmp_path_factory.mktemp("logs"), threads=1) as servers:
        yield servers


def reset(url: str, model_dir: Path) -> None:
    """Let the engine serve the source as version 0 again, after any failure."""
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        for path in ("/abort_weight_update", "/end_weight_update"):  # each engine has one of them
            client.post(path, json={})
        client.post(
            "/update_weights_from_disk", json={"model_path": str(model_dir), "weight_version": "0"}
        ).raise_for_status()
        client.post("/continue_generation", json={}).raise_for_status()


@pytest.fixture
def proxy(url: str, model_dir: Path) -> Iterator[Proxy]:
    with Proxy(url) as proxy:
        yield proxy
    reset(url, model_dir)


@pytest.fixture
def pool(honest: EmbeddedServers, proxy: Proxy, model_dir: Path) -> Iterator[EnginePool]:
    with EnginePool([honest.urls[0], proxy.url], TIMEOUT_S) as pool:
        yield pool
    reset(honest.urls[0], model_dir)


def make_transport(kind: str, folder: Path, source: HFFolder) -> Transport:
    if kind == "disk":
        return DiskTransport(source, folder / "staging")
    return (
        DistributedTransport(BUCKET, TIMEOUT_S, torch.device("cpu"))
        if kind == "distributed"
        else TensorTransport(BUCKET)
    )


def moved(source: HFFolder, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the source's weights plus noise of that seed."""
    generator = torch.Generator().manual_seed(seed)
    for name in source.tensors:
        stored = source.read(name)
        yield name, stored + 0.05 * torch.randn(stored.shape, generator=generator)


class World:
    """A pool, its sync over one transport, and the weights that were committed last."""

    def __init__(
        self,
        pool: EnginePool,
        proxy: Proxy,
        model_dir: Path,
        transport: Transport,
        committed: int,
        probe: Callable[[], ScoreProbe] | None = None,
    ) -> None:
        self.pool, self.proxy, self.source = pool, proxy, HFFolder(model_dir)
        self.good, self.bad = pool.live_urls
        self.transport = transport
        self.sync = WeightSync(pool, self.source, transport, probe=probe)
        self.committed = committed
        if committed:
            self.sync.push(self.weights(committed), committed)
        self.before = self.answer(self.good)

    def weights(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        return moved(self.source, seed)

    def answer(self, url: str | None = None) -> list[tuple[float, ...]]:
        """Return the log-probabilities of greedy requests, from one engine or from those that the pool chooses."""
        sampling = SamplingParams(max_new_tokens=6, temperature=0.0, ignore_eos=True)
        requests = [GenerationRequest(f"greedy-{i}", (5, 6, 7), 1, sampling) for i in range(4)]
        if url is not None:
            with EnginePool([url]) as one:
                samples = one.generate(requests)
        else:
            samples = self.pool.generate(requests)
            assert {version for (sample,) in samples for version in sample.columns["versions"].tolist()} == {
                self.committed
            }
        return [tuple(sample.columns["logmu"].tolist()) for (sample,) in samples]

    def fails(self, *words: str, error: type[Exception] = EngineError) -> str:
        """Assert that the next push fails with these words, and that only the committed weights are used afterwards."""
        with pytest.raises(error) as caught:
            self.sync.push(self.weights(9), 9)
        message = str(caught.value)
        for word in words:
            assert word in message, message
        assert self.sync.version == self.committed
        torch.testing.assert_close(torch.tensor(self.answer()), torch.tensor(self.before), atol=1e-4, rtol=0)
        in_use = [url for url in self.pool.live_urls if url not in self.pool.quarantined]
        assert self.good in in_use
        for url in in_use:
            torch.testing.assert_close(torch.tensor(self.answer(url)), torch.tensor(self.before), atol=1e-4, rtol=0)
        return message

    def recovers(self) -> None:
        """Assert that the next push, without a fault, brings both engines to the new version."""
        self.proxy.tamper, self.proxy.edit = lambda path, body: body, lambda path, answer: answer
        self.sync.engines.recover_lost()
        self.sync.push(self.weights(10), 10)
        assert not self.pool.quarantined and self.pool.live_urls == (self.good, self.bad)
        answers = [torch.tensor(self.answer(url)) for url in (self.good, self.bad)]
        torch.testing.assert_close(answers[0], answers[1], atol=1e-4, rtol=0)
        assert not torch.equal(answers[0], torch.tensor(self.before))


@pytest.fixture
def world(pool: EnginePool, proxy: Proxy, model_dir: Path, tmp_path: Path) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(kind: str, committed: int = 0) -> World:
        made.append(World(pool, proxy, model_dir, make_transport(kind, tmp_path, HFFolder(model_dir)), committed))
        return made[-1]

    yield make
    for one in made:
        one.sync.close()


in_buckets = pytest.mark.parametrize("kind", ["distributed", "tensor"])
every_transport = pytest.mark.parametrize("kind", ["disk", "distributed", "tensor"])


@every_transport
def test_without_sabotage_both_engines_take_every_version(world: Callable[..., World], kind: str) -> None:
    made = world(kind, committed=3)
    torch.testing.assert_close(torch.tensor(made.answer(made.bad)), torch.tensor(made.before), atol=1e-4, rtol=0)
    made.recovers()


def second_bucket_dropped() -> Callable[[str, Body], Body | Answer]:
    seen = []

    def tamper(path: str, body: Body) -> Body | Answer:
        if path == "/update_weights_from_tensor":
            seen.append(path)
            if len(seen) == 2:
                return Answer(success=True, message="ok")
        return body

    return tamper


def test_a_dropped_bucket_is_noticed_by_its_tensors(world: Callable[..., World]) -> None:
    made = world("tensor", committed=3)
    made.proxy.tamper = second_bucket_dropped()
    made.fails(made.bad, "tensor")
    made.recovers()


@pytest.fixture
def opaque(pool: EnginePool, sglang_only: None, monkeypatch: pytest.MonkeyPatch) -> EnginePool:
    """Return a pool whose SGLang server reports a GPU, so that its digests cannot be computed."""
    told = pool.traits

    def as_on_a_gpu(url: str) -> Traits:
        traits = told(url)
        return traits if traits.embedded else replace(traits, device="cuda")

    monkeypatch.setattr(pool, "traits", as_on_a_gpu)
    return pool


def test_where_digests_cannot_be_foretold_tensors_that_stayed_as_they_were_are_noticed(
    opaque: EnginePool, proxy: Proxy, model_dir: Path
) -> None:
    passes_everything = ScoreProbe((5, 6, 7), (0.0, 0.0), math.inf)
    made = World(opaque, proxy, model_dir, TensorTransport(BUCKET), 3, lambda: passes_everything)
    made.proxy.tamper = second_bucket_dropped()
    made.fails(made.bad, "(bucket 1) was sent with new values, and the engine holds what it held of version 3")
    made.recovers()
    made.sync.close()


def scored_plainly(model_dir: Path, seed: int) -> ScoreProbe:
    """Return a text scored by transformers with the weights of that seed. An fp32 engine differs by at most 1e-3."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    model.load_state_dict(dict(moved(HFFolder(model_dir), seed)))
    text = torch.randint(2, VOCAB, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    return ScoreProbe(tuple(text), tuple(logp_of(model, text[:1], text[1:]).tolist()), 1e-3)


def test_where_digests_cannot_be_foretold_an_engine_is_known_by_the_log_probabilities_of_the_trainer(
    opaque: EnginePool, proxy: Proxy, model_dir: Path
) -> None:
    """The probes of versions 3 and 10 are right. At version 9 the engine's weights differ from those of the probe."""
    seeds = iter([3, 4, 10])
    made = World(opaque, proxy, model_dir, TensorTransport(BUCKET), 3, lambda: scored_plainly(model_dir, next(seeds)))
    assert not opaque.quarantined
    torch.testing.assert_close(torch.tensor(made.answer(made.bad)), torch.tensor(made.before), atol=1e-4, rtol=0)
    message = made.fails(
        f"{made.bad}, weight version 9: the log-probabilities of the probe are off by", "0.001 is allowed"
    )
    assert f"{made.good}, weight version 9" not in message and opaque.quarantined.keys() == {made.bad}
    made.recovers()
    made.sync.close()


def test_an_engine_that_cannot_be_paused_leaves_nothing_staged(world: Callable[..., World]) -> None:
    made = world("disk", committed=3)
    made.proxy.tamper = lambda path, body: {"mode": "no_such_mode"} if path == "/pause_generation" else body
    made.fails(made.bad, "/pause_generation refused the request")
    staging = Path(made.transport._folders[0]).parent  # type: ignore[attr-defined]
    assert [folder.name for folder in staging.iterdir()] == ["v000003"]
    made.recovers()


def swapped_in_the_request(path: str, body: Body) -> Body:
    if path == "/update_weights_from_distributed" and body is not None:
        body["names"] = [{NORM: OTHER_NORM, OTHER_NORM: NORM}.get(name, name) for name in body["names"]]
    return body


def swapped_in_the_payload(path: str, body: Body) -> Body:
    if path == "/update_weights_from_tensor" and body is not None:
        swapped = {NORM: OTHER_NORM, OTHER_NORM: NORM}
        tensors = unpack_payload(body["serialized_named_tensors"][0])
        pieces = tuple(
            TensorSlot(swapped.get(name, name), t.dtype, tuple(t.shape), t.storage_offset() * t.itemsize)
            for name, t in tensors
        )
        data = torch.empty(0, dtype=torch.uint8).set_(tensors[0][1].untyped_storage())
        body["serialized_named_tensors"] = [pack_payload(Bucket(0, pieces, data, last=False))]
    return body


@pytest.mark.parametrize(
    ("kind", "swap"),
    [("distributed", swapped_in_the_request), ("tensor", swapped_in_the_payload)],
    ids=["distributed", "tensor"],
)
@pytest.mark.parametrize("committed", [0, 3])
def test_swapped_names_are_noticed(world: Callable[..., World], kind: str, swap: Any, committed: int) -> None:
    made = world(kind, committed)
    made.proxy.tamper = swap
    made.fails(made.bad, "input_layernorm.weight' (bucket", "should have digest")
    made.recovers()


@in_buckets
def test_a_bit_that_flips_on_the_way_is_noticed(world: Callable[..., World], kind: str) -> None:
    made = world(kind)
    send = made.transport.send  # type: ignore[attr-defined]

    def flip(engines: Any, ranks: Any, bucket: Bucket, version: int | None) -> dict[str, EngineError]:
        if bucket.index == 2:
            data = shared_buffer(bucket.data.numel(), torch.device("cpu"))
            data.copy_(bucket.data)
            data[17] ^= 4
            bucket = replace(bucket, data=data)
        return send(engines, ranks, bucket, version)  # type: ignore[no-any-return]

    made.transport.send = flip  # type: ignore[attr-defined]
    message = made.fails("should have digest", "(bucket 2)")
    assert made.bad in message and made.good in message
    made.transport.send = send  # type: ignore[attr-defined]
    made.recovers()


@every_transport
def test_an_engine_that_answers_200_and_applies_nothing_is_noticed(world: Callable[..., World], kind: str) -> None:
    made = world(kind, committed=3)
    if kind == "distributed" and not made.pool.traits(made.bad).embedded:
        pytest.skip(
            "SGLang applies every bucket when it comes, and its end changes nothing: "
            "see the broadcast nobody takes part in"
        )
    updates = {"disk": "/update_weights_from_disk", "tensor": "/update_weights_from_tensor"}

    def swallow(path: str, body: Body) -> Body | Answer:
        if path == updates.get(kind):
            return Answer(success=True, message="ok")
        if kind == "distributed" and path == "/end_weight_update":
            return Answer(success=True, message="ok")
        return body

    def lie(path: str, answer: Any) -> Any:
        return {**answer, "weight_version": "9"} if path == "/model_info" else answer

    made.proxy.tamper = swallow
    made.fails(made.bad, "reports weight version '3' after loading version 9")
    made.proxy.edit = lie
    made.fails(made.bad, "should have digest")
    made.recovers()


def test_an_engine_that_answers_200_and_takes_no_part_in_the_broadcast_is_noticed(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "JOIN_S", TIMEOUT_S)  # the wait for a broadcast that an engine does not join
    made = world("distributed", committed=3)
    path_of = "/update_weights_from_distributed"
    made.proxy.tamper = lambda path, body: Answer(success=True, message="ok") if path == path_of else body
    made.fails(made.bad, "bucket 0 ('", "did not arrive")
    made.recovers()


def test_an_engine_that_refuses_a_bucket_does_not_make_the_broadcast_wait(world: Callable[..., World]) -> None:
    made = world("distributed", committed=3)

    def spoil(path: str, body: Body) -> Body:
        if path == "/update_weights_from_distributed" and body is not None:
            body["dtypes"] = ["no_such_dtype" for _ in body["dtypes"]]
        return body

    made.proxy.tamper = spoil
    made.fails(made.bad, "bucket 0 ('", "did not arrive")
    made.recovers()


@in_buckets
def test_an_engine_whose_update_was_never_begun_refuses_the_bucket(world: Callable[..., World], kind: str) -> None:
    made = world(kind)
    made.proxy.tamper = lambda path, body: Answer(success=True) if path == "/begin_weight_update" else body
    made.fails(made.bad, "bucket 0 ('", "begin_weight_update")
    made.recovers()


@contextmanager
def struck_inside_an_update(
    engine: str, kind: str, fate: signal.Signals, timeout_s: float, good: str, model_dir: Path, folder: Path
) -> Iterator[tuple[World, psutil.Process]]:
    """Yield two engines after a failed push. The second one got the signal `fate` at bucket 1, and is lost.

    `timeout_s` is the limit of every call. A hanging engine is detected after this time, an ended one at once.
    """
    with start_servers(engine, model_dir, folder) as servers, EnginePool([good, servers.urls[0]], timeout_s) as pool:
        first = psutil.Process(servers.pids[0])
        struck = first.children()[0] if engine == "sglang" else first  # for SGLang, the first process is the guard
        distributing = kind == "distributed"
        transport = (
            DistributedTransport(BUCKET, timeout_s, torch.device("cpu")) if distributing else TensorTransport(BUCKET)
        )
        made = World.__new__(World)
        made.pool, made.source, made.transport, made.committed = pool, HFFolder(model_dir), transport, 3
        made.good, made.bad = pool.live_urls
        made.sync = WeightSync(pool, made.source, transport)
        made.sync.push(made.weights(3), 3)
        made.before = made.answer(made.good)
        send, hit = transport.send, []

        def strike(engines: Any, ranks: Any, bucket: Bucket, version: int | None) -> dict[str, EngineError]:
            if bucket.index == 1:
                struck.send_signal(fate)
                hit.append(bucket.index)
            return send(engines, ranks, bucket, version)

        transport.send = strike  # type: ignore[method-assign]
        made.fails(made.bad, "bucket")
        assert hit and pool.live_urls == (made.good,)
        transport.send = send  # type: ignore[method-assign]
        yield made, struck
        made.sync.close()
    reset(good, model_dir)


@in_buckets
def test_an_engine_that_is_killed_between_begin_and_end_is_dropped(
    honest: EmbeddedServers, engine: str, model_dir: Path, tmp_path: Path, kind: str
) -> None:
    with struck_inside_an_update(engine, kind, signal.SIGKILL, 30.0, honest.urls[0], model_dir, tmp_path) as (made, _):
        made.sync.push(made.weights(10), 10)
        assert made.pool.weight_version(made.good) == "10"


@in_buckets
def test_an_engine_that_hangs_between_begin_and_end_is_dropped_and_comes_back(
    honest: EmbeddedServers,
    embedded_only: None,
    model_dir: Path,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "JOIN_S", 10.0)  # the wait for our broadcast, which the stopped engine blocks
    strike = struck_inside_an_update("embedded", kind, signal.SIGSTOP, 10.0, honest.urls[0], model_dir, tmp_path)
    with strike as (made, stopped):
        made.sync.push(made.weights(10), 10)
        stopped.send_signal(signal.SIGCONT)
        assert made.pool.recover_lost() == (made.bad,) and made.pool.quarantined.keys() == {made.bad}
        made.sync.push(made.weights(11), 11)
        assert not made.pool.quarantined and [made.pool.weight_version(url) for url in made.pool.live_urls] == [
            "11",
            "11",
        ]


def test_a_full_disk_touches_no_engine(world: Callable[..., World], embedded_only: None) -> None:
    made = world("disk", committed=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # like a disk quota: a write fails halfway
    try:
        made.fails("cannot be written to", "v000009", "free space there", error=CheckpointError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not any(
        name.startswith(".v000009")
        for name in os.listdir(Path(made.transport._folders[0]).parent)  # type: ignore[attr-defined]
    )
    made.recovers()


def test_an_engine_that_was_restarted_is_not_used_before_it_was_synced(
    honest: EmbeddedServers, proxy: Proxy, world: Callable[..., World], model_dir: Path, url: str
) -> None:
    made = world("disk", committed=3)
    reset(url, model_dir)  # like a restart: the engine serves the weights of its start
    made.answer()
    assert made.pool.quarantined.keys() == {made.bad} and "restarted" in made.pool.quarantined[made.bad]
    made.recovers()
