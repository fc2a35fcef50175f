"""Weight sync is a transaction: every engine serves the new weights, or every engine serves the old ones."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rl.engines.pool import EnginePool, GenerationRequest, SamplingParams
from megatron_rl.engines.processes.embedded import EmbeddedServers
from megatron_rl.engines.processes.server_process import Servers
from megatron_rl.errors import CheckpointError, EngineError, UserError
from megatron_rl.weight_sync.sync import WeightSync
from megatron_rl.weights.digest import tensor_digest
from megatron_rl.weights.hf_folder import MANIFEST, SINGLE, HFFolder
from tests.contract.conftest import until_running
from tests.disk_sync import disk_sync
from tests.models import make_qwen3
from tests.parallel.group import RankGroup

Hook = Callable[[str, Path, int], int]


class HookedPool(EnginePool):
    """A real pool that calls a hook just before one update. The hook may change the staged folder or a server.

    The hook gets (url, folder, version) and returns the version to request.
    """

    hook: Hook | None = None
    hooking = Lock()  # the other engine must not read the folder while it is rewritten

    def update_weights_from_disk(self, url: str, folder: Path, version: int) -> None:
        with self.hooking:
            hook, self.hook = self.hook, None
            version = version if hook is None else hook(url, folder, version)
        super().update_weights_from_disk(url, folder, version)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("model"), tied=True, layers=2, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def servers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with EmbeddedServers(model, tmp_path_factory.mktemp("logs"), 2, threads=1) as started:
        yield started


@pytest.fixture
def pool(servers: Servers, model: Path) -> Iterator[HookedPool]:
    """Yield a pool of both engines, at version 0 with the source's weights."""
    with HookedPool(servers.urls, timeout_s=60) as pool:
        for url in servers.urls:
            pool.update_weights_from_disk(url, model, 0)
            pool.resume(url)
        yield pool


@pytest.fixture
def source(model: Path) -> HFFolder:
    return HFFolder(model)


@pytest.fixture
def sync(pool: HookedPool, source: HFFolder, tmp_path: Path) -> Iterator[WeightSync]:
    sync = disk_sync(pool, source, tmp_path / "staging")
    yield sync
    sync.close()


def weights(source: HFFolder, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the source's weights plus noise of that seed."""
    generator = torch.Generator().manual_seed(seed)
    for name in source.tensors:
        stored = source.read(name)
        yield name, stored + 0.05 * torch.randn(stored.shape, generator=generator)


def digests(source: HFFolder, seed: int | None) -> dict[str, str]:
    chosen = ((name, source.read(name)) for name in source.tensors) if seed is None else weights(source, seed)
    return {name: tensor_digest(tensor) for name, tensor in chosen}


def logprobs(pool: EnginePool) -> list[list[float]]:
    """Return the log-probabilities of each live engine for one greedy request."""
    sampling = SamplingParams(max_new_tokens=6, temperature=0.0, ignore_eos=True)
    out = []
    for url in pool.live_urls:
        with EnginePool([url]) as one:
            sample = one.generate([GenerationRequest(f"probe-{url}", (5, 6, 7), 1, sampling)])[0][0]
            out.append(sample.columns["logmu"].tolist())
    return out


def assert_serving(pool: EnginePool, source: HFFolder, version: int, seed: int | None, count: int = 2) -> None:
    assert len(pool.live_urls) == count
    for url in pool.live_urls:
        assert pool.weight_version(url) == str(version)
        assert pool.checksums(url) == digests(source, seed)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], *, manifest: bool) -> None:
    """Change the tensors of a staged folder; with `manifest`, also update its manifest."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / SINGLE).items()}
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    if manifest:
        stated = json.loads((folder / MANIFEST).read_text())
        stated["tensors"] = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
        (folder / MANIFEST).write_text(json.dumps(stated))


def nudge(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] += 1e-4


def test_a_push_makes_every_engine_serve_the_new_version(pool: HookedPool, source: HFFolder, sync: WeightSync) -> None:
    before = logprobs(pool)
    report = sync.push(weights(source, 1), 1)
    after = logprobs(pool)
    assert before[0] == before[1] and after[0] == after[1] and before[0] != after[0]
    assert_serving(pool, source, 1, 1)
    assert (report.version, report.nbytes, report.dropped, sync.version) == (1, source.nbytes, {}, 1)


def test_generation_that_runs_through_a_push_ends_whole_under_the_new_version(
    pool: HookedPool, source: HFFolder, sync: WeightSync
) -> None:
    sampling = SamplingParams(max_new_tokens=1500, temperature=1.0, ignore_eos=True)
    requests = [GenerationRequest(f"long-{i}", (1, 2, 3), 1, sampling) for i in range(2)]
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(pool.generate, requests)
        for url in pool.live_urls:  # one request each
            with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
                until_running(client)
        sync.push(weights(source, 1), 1)
        samples = [sample for request in running.result() for sample in request]
    assert [(len(sample.tokens), sample.finish_reason) for sample in samples] == [(1500, "length")] * 2
    assert [np.unique(sample.columns["versions"]).tolist() for sample in samples] == [[0, 1], [0, 1]]


def spoiled_byte(_: str, folder: Path, version: int) -> int:
    with (folder / SINGLE).open("r+b") as stream:
        stream.seek(-3, os.SEEK_END)
        byte = stream.read(1)
        stream.seek(-3, os.SEEK_END)
        stream.write(bytes([byte[0] ^ 1]))
    return version


def truncated_file(_: str, folder: Path, version: int) -> int:
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 1)
    return version


def other_weights_that_the_engine_believes(_: str, folder: Path, version: int) -> int:
    rewrite(folder, nudge, manifest=True)
    return version


def another_version(_: str, folder: Path, version: int) -> int:
    (folder / MANIFEST).unlink()
    return version + 1


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (spoiled_byte, "model.norm.weight"),
        (truncated_file, "safetensors"),
        (other_weights_that_the_engine_believes, "'model.layers.1.mlp.down_proj.weight' should have digest"),
        (another_version, "reports weight version '8' after loading version 7"),
    ],
)
@pytest.mark.parametrize("committed", [0, 3])
def test_an_engine_with_other_weights_makes_the_push_fail_and_all_serve_the_old(
    pool: HookedPool, source: HFFolder, sync: WeightSync, tmp_path: Path, hook: Hook, words: str, committed: int
) -> None:
    if committed:
        sync.push(weights(source, committed), committed)
    before = logprobs(pool)
    pool.hook = hook
    with pytest.raises(EngineError) as caught:
        sync.push(weights(source, 7), 7)
    assert words in str(caught.value) and any(url in str(caught.value) for url in pool.live_urls)
    assert logprobs(pool) == before
    assert_serving(pool, source, committed, committed or None)
    assert sync.version == committed
    assert [folder.name for folder in (tmp_path / "staging").iterdir()] == ([f"v{committed:06d}"] if committed else [])
    sync.push(weights(source, 7), 7)
    assert_serving(pool, source, 7, 7)


def test_weights_that_are_not_finite_never_reach_an_engine(
    pool: HookedPool, source: HFFolder, sync: WeightSync
) -> None:
    def poisoned() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights(source, 1):
            if name == "model.layers.0.mlp.up_proj.weight":
                tensor[1, 2] = float("nan")
            yield name, tensor

    stream = poisoned()
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight' holds values that are not finite"
    ):
        sync.push(stream, 1)
    assert next(stream, None) is None  # a collective export was still run to its end
    assert_serving(pool, source, 0, None)


def test_a_tensor_that_was_not_sent_is_noticed(pool: HookedPool, source: HFFolder, sync: WeightSync) -> None:
    with pytest.raises(EngineError, match=r"model\.norm\.weight"):
        sync.push((pair for pair in weights(source, 1) if pair[0] != "model.norm.weight"), 1)
    assert_serving(pool, source, 0, None)


def test_versions_only_grow(source: HFFolder, sync: WeightSync) -> None:
    sync.push(weights(source, 4), 4)
    with pytest.raises(UserError, match="version 4 does not follow version 4"):
        sync.push(weights(source, 5), 4)
    assert sync.version == 4


def test_only_the_last_versions_stay_on_disk_and_close_removes_them(
    pool: HookedPool, source: HFFolder, sync: WeightSync, tmp_path: Path
) -> None:
    for version in (1, 2, 3):
        sync.push(weights(source, version), version)
    assert sorted(folder.name for folder in (tmp_path / "staging").iterdir()) == ["v000002", "v000003"]
    sync.close()
    assert list((tmp_path / "staging").iterdir()) == []
    assert_serving(pool, source, 3, 3)


def test_the_default_staging_folder_is_private_and_removed(pool: HookedPool, source: HFFolder) -> None:
    seen: list[Path] = []

    def note(_: str, folder: Path, version: int) -> int:
        seen.append(folder)
        return version

    sync, pool.hook = disk_sync(pool, source), note
    sync.push(weights(source, 1), 1)
    assert seen[0].is_dir() and seen[0].parent.stat().st_mode & 0o777 == 0o700
    sync.close()
    assert not seen[0].parent.exists()


STAGE = """
import sys
from pathlib import Path
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weight_sync.expected_digests import ExpectedDigests
from megatron_rl.weight_sync.transports.disk import DiskTransport

source = HFFolder(Path(sys.argv[1]))
transport = DiskTransport(source)
transport.prepare(((name, source.read(name)) for name in source.tensors), 1, ExpectedDigests(plain=None))
print(transport._private, flush=True)
sys.stdin.read()
"""


def test_private_staging_folders_of_killed_processes_are_removed_and_those_in_use_are_not(model: Path) -> None:
    def staging(**pipes: Any) -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", STAGE, str(model)], text=True, stdout=subprocess.PIPE, **pipes
        )
        assert process.stdout is not None
        folder = process.stdout.readline().strip()
        assert folder, "the process staged nothing"
        return process, Path(folder)

    first, killed = staging(stdin=subprocess.PIPE)
    second, living = staging(stdin=subprocess.PIPE)
    assert (killed / "v000001" / "config.json").is_file(), "the first lived when the second began"
    first.kill()
    first.wait()
    third, _ = staging(stdin=subprocess.DEVNULL)
    assert not killed.exists() and (living / "v000001" / "config.json").is_file()
    third.wait()
    second.kill()
    second.wait()
    shutil.rmtree(living)


def test_a_staging_folder_that_cannot_be_written_is_named(pool: HookedPool, source: HFFolder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    sync = disk_sync(pool, source, tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"cannot be written to .*/file/v000001 .*another staging folder"):
        sync.push(weights(source, 1), 1)
    assert_serving(pool, source, 0, None)


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}], ids=str)
def test_every_rank_of_the_trainer_learns_the_outcome(
    two_ranks: RankGroup, pool: HookedPool, model: Path, tmp_path: Path, layout: dict[str, int]
) -> None:
    url = pool.live_urls[0]
    first, second = two_ranks.run(
        "tests.parallel.weight_steps", "push", model=model, layout=layout, url=url, staging=tmp_path / "staging"
    )
    assert first == second
    assert first[0] == "1" and first[2] == "3"
    assert first[1].startswith(
        "CheckpointError: tensor 'model.layers.1.mlp.down_proj.weight' holds values that are not finite"
    )
    assert pool.weight_version(url) == "3"
    pushed = dict.fromkeys(["model.layers.1.mlp.down_proj.weight"], torch.full((64, 96), 0.25))
    served = pool.checksums(url)
    for name, digest in digests(HFFolder(model), None).items():
        assert served[name] == (tensor_digest(pushed[name]) if name in pushed else digest)


def test_a_killed_engine_is_dropped_and_the_others_serve_the_old_version(
    servers: Servers, pool: HookedPool, source: HFFolder, sync: WeightSync, model: Path, tmp_path: Path
) -> None:
    """This test must be the last one of the module: it kills the second server."""
    sync.push(weights(source, 1), 1)
    before = logprobs(pool)

    def kill(_: str, folder: Path, version: int) -> int:
        servers.process(1).process.kill()
        servers.process(1).process.wait()
        return version

    pool.hook = kill
    with pytest.raises(EngineError, match=f"{servers.urls[1]}.*does not respond"):
        sync.push(weights(source, 2), 2)
    assert pool.live_urls == (servers.urls[0],)
    assert logprobs(pool) == before[:1]
    assert_serving(pool, source, 1, 1, count=1)
    sync.push(weights(source, 2), 2)
    assert_serving(pool, source, 2, 2, count=1)
