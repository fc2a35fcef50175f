"""An engine whose memory is given back while somebody else needs it."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from conftest import WriteWeights, logp_of
from transformers import Qwen3ForCausalLM

from megatron_rl.errors import EngineError
from megatron_rl.rollout.client import EnginePool, GenerationRequest, SamplingParams
from megatron_rl.training.resting import RestingEngines

PROMPT = [5, 17, 250, 99, 3]


def ask(api: httpx.Client, tokens: int = 4, **more: Any) -> httpx.Response:
    params = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
    return api.post("/generate", json={"input_ids": PROMPT, "sampling_params": params, "return_logprob": True, **more})


def update(api: httpx.Client, folder: Path, version: str) -> httpx.Response:
    return api.post("/update_weights_from_disk", json={"model_path": str(folder), "weight_version": version})


@pytest.fixture
def restored(api: httpx.Client, model_dir: Path) -> Iterator[httpx.Client]:
    """The server, which serves its first weights again afterwards."""
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
    restored.post("/release_memory_occupation", json={}).raise_for_status()  # once more changes nothing


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
        time.sleep(0.15)
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
        RestingEngines(note).wake(pool)  # nothing rests
        RestingEngines(note).rest(pool)
        assert note.is_file()
    with EnginePool([url]) as pool:
        RestingEngines(note).wake(pool)
        assert not note.exists()
        with pytest.raises(EngineError, match="update them first"):
            pool.generate([request])
        pool.update_weights_from_disk(url, write_weights(other_tensors, 8), 8)
        assert pool.generate([request])[0][0].tokens
