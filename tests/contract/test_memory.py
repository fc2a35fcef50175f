"""An engine releases its memory while another process needs it, and allocates it again."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import Qwen3ForCausalLM

from megatron_rl.engines.offload import OffloadedEngines
from megatron_rl.engines.pool import EnginePool, GenerationRequest, SamplingParams
from megatron_rl.errors import EngineError
from megatron_rl.weights.digest import tensor_digest
from megatron_rl.weights.hf_folder import HFFolder
from tests.contract.conftest import WriteWeights, logp_of, until_running
from tests.disk_sync import disk_sync

PROMPT = [5, 17, 250, 99, 3]


def ask(api: httpx.Client, tokens: int = 4, **more: Any) -> httpx.Response:
    params = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
    return api.post("/generate", json={"input_ids": PROMPT, "sampling_params": params, "return_logprob": True, **more})


def update(api: httpx.Client, folder: Path, version: str) -> httpx.Response:
    return api.post("/update_weights_from_disk", json={"model_path": str(folder), "weight_version": version})


@pytest.fixture
def restored(api: httpx.Client, model_dir: Path) -> Iterator[httpx.Client]:
    """Yield the server's client. Afterwards the server serves its first weights again."""
    yield api
    if api.get("/model_info").json().get("memory") == "released":
        api.post("/resume_memory_occupation", json={}).raise_for_status()
    update(api, model_dir, "0").raise_for_status()


def test_a_released_engine_is_brought_back_by_resuming_and_new_weights(
    restored: httpx.Client, model: Qwen3ForCausalLM, model_dir: Path
) -> None:
    before = ask(restored).json()
    assert restored.post("/release_memory_occupation", json={}).status_code == 200
    assert restored.get("/health").status_code == 200
    assert restored.post("/resume_memory_occupation", json={}).status_code == 200
    assert update(restored, model_dir, "6").status_code == 200
    after = ask(restored).json()
    assert after["output_ids"] == before["output_ids"] and after["meta_info"]["weight_version"] == "6"
    logprobs = torch.tensor([pair[0] for pair in after["meta_info"]["output_token_logprobs"]])
    torch.testing.assert_close(logprobs, logp_of(model, PROMPT, after["output_ids"]), atol=1e-4, rtol=0)


def test_nothing_is_generated_nor_loaded_while_the_memory_is_released(
    restored: httpx.Client, embedded_only: None, model_dir: Path
) -> None:
    restored.post("/release_memory_occupation", json={"tags": ["weights", "kv_cache"]}).raise_for_status()
    for answer in (
        ask(restored),
        update(restored, model_dir, "6"),
        restored.post("/weights_checker", json={"action": "checksum"}),
    ):
        assert answer.status_code == 400
        assert "/resume_memory_occupation" in answer.json()["message"]
    restored.post("/release_memory_occupation", json={}).raise_for_status()  # a second call changes nothing


def test_a_resumed_engine_without_weights_says_what_it_lacks(restored: httpx.Client, embedded_only: None) -> None:
    restored.post("/release_memory_occupation", json={}).raise_for_status()
    restored.post("/resume_memory_occupation", json={}).raise_for_status()
    answer = ask(restored)
    assert answer.status_code == 400 and "update them first" in answer.json()["message"]


def test_resuming_an_engine_that_was_not_released_changes_nothing(restored: httpx.Client, embedded_only: None) -> None:
    before = ask(restored).json()["output_ids"]
    assert restored.post("/resume_memory_occupation", json={}).status_code == 200
    assert restored.post("/release_memory_occupation", json={"tags": ["kv_cache"]}).status_code == 200
    assert ask(restored).json()["output_ids"] == before


def test_memory_in_use_is_not_released(restored: httpx.Client, embedded_only: None) -> None:
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(ask, restored, 2000, rid="running")
        until_running(restored)
        refused = restored.post("/release_memory_occupation", json={})
        assert refused.status_code == 400 and "being served" in refused.json()["message"]
        restored.post("/abort_request", json={"abort_all": True})
        assert running.result().status_code == 200


def test_an_unknown_tag_is_refused_by_field(api: httpx.Client, embedded_only: None) -> None:
    answer = api.post("/release_memory_occupation", json={"tags": ["graphs"]})
    assert answer.status_code == 400 and "tags" in answer.json()["message"]


def test_engines_that_rest_are_woken_by_a_later_process(
    restored: httpx.Client,
    embedded_only: None,
    url: str,
    tmp_path: Path,
    other_tensors: dict[str, torch.Tensor],
    write_weights: WriteWeights,
) -> None:
    request = GenerationRequest(rid="a", prompt_tokens=tuple(PROMPT), sampling=SamplingParams(max_new_tokens=2), n=1)
    note = tmp_path / "run" / "released.json"
    note.parent.mkdir()
    with EnginePool([url]) as pool:
        OffloadedEngines(note).resume(pool)  # no engine is offloaded
        OffloadedEngines(note).release(pool)
        assert note.is_file()
    with EnginePool([url]) as pool:
        OffloadedEngines(note).resume(pool)
        assert not note.exists()
        with pytest.raises(EngineError, match="update them first"):
            pool.generate([request])
        pool.update_weights_from_disk(url, write_weights(other_tensors, 8), 8)
        assert len(pool.generate([request])[0][0].tokens)


@pytest.fixture
def offloaded(restored: httpx.Client, embedded_only: None, url: str, tmp_path: Path) -> OffloadedEngines:
    """Return the note of a run that was killed while the server was offloaded."""
    offloaded = OffloadedEngines(tmp_path / "released.json")
    with EnginePool([url]) as pool:
        offloaded.release(pool)
    return offloaded


def test_a_woken_engine_without_weights_is_brought_to_a_later_process_s_first_version(
    offloaded: OffloadedEngines,
    restored: httpx.Client,
    url: str,
    model_dir: Path,
    tmp_path: Path,
    other_tensors: dict[str, torch.Tensor],
) -> None:
    with EnginePool([url]) as pool:
        offloaded.resume(pool)
        assert pool.memory(url) == "empty" and not pool.holds_weights(url)
    with EnginePool([url]) as pool:  # another pool: the note is deleted and the engine is empty
        sync = disk_sync(pool, HFFolder(model_dir), tmp_path / "staging")
        assert sync.push(iter(other_tensors.items()), 5).dropped == {}
        assert pool.weight_version(url) == "5" and pool.holds_weights(url)
        assert pool.checksums(url) == {name: tensor_digest(tensor) for name, tensor in other_tensors.items()}
        sync.close()
    assert ask(restored).json()["meta_info"]["weight_version"] == "5"


class SpoilingPool(EnginePool):
    """A real pool that damages the weights just before it loads them, `times` times."""

    times = 1

    def update_weights_from_disk(self, url: str, folder: Path, version: int) -> None:
        if self.times:
            self.times -= 1
            (folder / "model.safetensors").write_bytes(b"nothing")
        super().update_weights_from_disk(url, folder, version)


def test_an_empty_engine_is_dropped_when_its_first_update_fails_for_it_has_nothing_to_go_back_to(
    offloaded: OffloadedEngines, url: str, model_dir: Path, tmp_path: Path, other_tensors: dict[str, torch.Tensor]
) -> None:
    with SpoilingPool([url]) as pool:
        offloaded.resume(pool)
        sync = disk_sync(pool, HFFolder(model_dir), tmp_path / "staging")
        with pytest.raises(EngineError, match=f"weight version 5 is not served .*no engine is left; lost: {url}"):
            sync.push(iter(other_tensors.items()), 5)
        assert pool.live_urls == ()
        with pytest.raises(EngineError, match="held no weights before: its memory had been released"):
            pool.generate([GenerationRequest("a", tuple(PROMPT), 1, SamplingParams(max_new_tokens=2))])
        sync.close()


def test_an_engine_that_rested_within_one_process_goes_back_to_the_version_before(
    restored: httpx.Client,
    embedded_only: None,
    url: str,
    model_dir: Path,
    tmp_path: Path,
    other_tensors: dict[str, torch.Tensor],
) -> None:
    offloaded = OffloadedEngines(tmp_path / "released.json")
    with SpoilingPool([url]) as pool:
        sync, pool.times = disk_sync(pool, HFFolder(model_dir), tmp_path / "staging"), 0
        sync.push(iter(other_tensors.items()), 5)
        offloaded.release(pool)
        offloaded.resume(pool)
        pool.times = 1
        with pytest.raises(EngineError, match="again serve"):
            sync.push(iter((name, tensor + 1) for name, tensor in other_tensors.items()), 6)
        assert pool.live_urls == (url,) and pool.weight_version(url) == "5" and pool.holds_weights(url)
        sync.close()


def test_an_engine_is_resumed_once_whoever_woke_it(
    offloaded: OffloadedEngines, restored: httpx.Client, url: str
) -> None:
    class CountingPool(EnginePool):
        resumed = 0

        def resume_memory(self, url: str) -> None:
            self.resumed += 1
            super().resume_memory(url)

    restored.post(
        "/resume_memory_occupation", json={}
    ).raise_for_status()  # by a process that was killed before it could write the note
    with CountingPool([url]) as pool:
        offloaded.resume(pool)
        assert pool.resumed == 0 and offloaded.urls == []


def test_an_engine_that_cannot_be_reached_stays_noted_and_the_others_wake(
    offloaded: OffloadedEngines, url: str
) -> None:
    gone = "http://127.0.0.1:9"
    offloaded.note.write_text(json.dumps([gone, url]))
    with EnginePool([gone, url]) as pool:
        offloaded.resume(pool)
        assert pool.memory(url) == "empty"
    assert offloaded.urls == [gone]
    offloaded.forget()
    assert not offloaded.note.exists()
