"""A real server can be paused, its requests aborted, and its weights changed."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import Qwen3ForCausalLM

from megatron_rl.engines.pool import EnginePool
from megatron_rl.protocol.generation import error_message
from megatron_rl.weights.digest import tensor_digest
from tests.contract.conftest import WriteWeights, logp_of, until_running

PROMPT = [5, 17, 250, 99, 3]
LONG = 2000


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def ask(api: httpx.Client, rid: str, n: int = 1, tokens: int = LONG, seed: int = 1) -> Any:
    params = {"max_new_tokens": tokens, "ignore_eos": True, "n": n, "sampling_seed": seed}
    body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True, "rid": rid}
    return api.post("/generate", json=body)


def post(api: httpx.Client, path: str, **body: Any) -> httpx.Response:
    return api.post(path, json=body)


def update(api: httpx.Client, folder: Path, version: str) -> httpx.Response:
    """Update as the trainer's client does, which flushes the cache in a separate call."""
    return post(api, "/update_weights_from_disk", model_path=str(folder), weight_version=version, flush_cache=False)


def start_long(pool: ThreadPoolExecutor, api: httpx.Client, rid: str, **more: Any) -> "Future[httpx.Response]":
    future = pool.submit(ask, api, rid, **more)
    until_running(api)
    time.sleep(0.1)  # so that some tokens are generated
    assert not future.done(), "the request should still be running"
    return future


def logprobs(answer: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([pair[0] for pair in answer["meta_info"]["output_token_logprobs"]])


def greedy_first(api: httpx.Client) -> dict[str, Any]:
    params = {"max_new_tokens": 6, "ignore_eos": True, "temperature": 0.0}
    return api.post("/generate", json={"input_ids": PROMPT, "sampling_params": params, "return_logprob": True}).json()


def test_an_aborted_request_keeps_its_partial_output(api: httpx.Client, pool: ThreadPoolExecutor, model: Any) -> None:
    running = start_long(pool, api, "long")
    other = pool.submit(ask, api, "other", tokens=300)
    assert post(api, "/abort_request", rid="long").status_code == 200
    answer = running.result().json()
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    output = answer["output_ids"]
    assert 0 < len(output) < LONG
    torch.testing.assert_close(logprobs(answer), logp_of(model, PROMPT, output), atol=1e-4, rtol=0)
    assert len(other.result().json()["output_ids"]) == 300


def test_all_samples_of_an_aborted_request_end(
    api: httpx.Client, embedded_only: None, pool: ThreadPoolExecutor
) -> None:
    running = start_long(pool, api, "long", n=2)
    post(api, "/abort_request", rid="long")
    assert [answer["meta_info"]["finish_reason"]["type"] for answer in running.result().json()] == ["abort"] * 2


def test_abort_all_ends_every_request(api: httpx.Client, pool: ThreadPoolExecutor) -> None:
    running = [start_long(pool, api, f"r{at}") for at in range(2)]
    while not all(future.done() for future in running):  # an engine shows that one runs, not that the second has come
        post(api, "/abort_request", abort_all=True)
        time.sleep(0.1)
    reasons = [future.result().json()["meta_info"]["finish_reason"]["type"] for future in running]
    assert reasons == ["abort", "abort"]


@pytest.mark.parametrize("n", [1, 2])
def test_a_request_whose_client_left_is_ended(api: httpx.Client, n: int) -> None:
    """The cache can be flushed as soon as no request runs."""
    params = {"max_new_tokens": LONG, "ignore_eos": True, "n": n}
    with pytest.raises(httpx.ReadTimeout):
        api.post("/generate", json={"input_ids": PROMPT, "sampling_params": params, "rid": "left"}, timeout=0.3)
    end = time.monotonic() + 6.0  # much less than the time for LONG tokens
    while (answer := post(api, "/flush_cache")).status_code != 200:
        assert time.monotonic() < end, answer.text
        time.sleep(0.1)


def test_a_request_id_in_use_is_refused(api: httpx.Client, pool: ThreadPoolExecutor) -> None:
    running = start_long(pool, api, "twin")
    second = ask(api, "twin", tokens=1)
    assert second.status_code == 400
    assert "twin" in second.text
    post(api, "/abort_request", abort_all=True)
    running.result()


def test_pausing_with_abort_ends_requests_and_holds_new_ones(api: httpx.Client, pool: ThreadPoolExecutor) -> None:
    running = start_long(pool, api, "old")
    post(api, "/pause_generation", mode="abort")
    assert running.result().json()["meta_info"]["finish_reason"]["type"] == "abort"
    waiting = pool.submit(ask, api, "new", tokens=3)
    time.sleep(0.2)
    assert not waiting.done()
    post(api, "/continue_generation")
    assert len(waiting.result().json()["output_ids"]) == 3


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_paused_request_goes_on_where_it_was(
    api: httpx.Client, pool: ThreadPoolExecutor, mode: str, model: Any
) -> None:
    running = start_long(pool, api, "paused", n=2, seed=4, tokens=700)
    post(api, "/pause_generation", mode=mode)
    time.sleep(0.1)
    assert not running.done()
    post(api, "/continue_generation")
    for answer in running.result().json():
        assert answer["meta_info"]["num_retractions"] == (mode == "retract")
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 700}
        torch.testing.assert_close(logprobs(answer), logp_of(model, PROMPT, answer["output_ids"]), atol=1e-4, rtol=0)


def test_flushing_needs_a_cache_without_requests(api: httpx.Client, pool: ThreadPoolExecutor) -> None:
    running = start_long(pool, api, "holder")
    post(api, "/pause_generation", mode="in_place")
    assert post(api, "/flush_cache").status_code == 400
    post(api, "/pause_generation", mode="retract")
    assert post(api, "/flush_cache").status_code == 200
    post(api, "/abort_request", abort_all=True)
    running.result()


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_tokens_carry_the_version_they_were_sampled_under(
    api: httpx.Client,
    pool: ThreadPoolExecutor,
    mode: str,
    model: Qwen3ForCausalLM,
    other_tensors: dict[str, torch.Tensor],
    write_weights: WriteWeights,
) -> None:
    running = start_long(pool, api, "across", tokens=700)
    post(api, "/pause_generation", mode=mode)
    assert update(api, write_weights(other_tensors, 7), "7").status_code == 200
    assert post(api, "/flush_cache").status_code == (200 if mode == "retract" else 400)
    post(api, "/continue_generation")
    answer = running.result().json()
    output, spans = answer["output_ids"], answer["meta_info"]["weight_versions"]
    change = spans[0]["end"]
    assert spans == [{"version": "0", "start": 0, "end": change}, {"version": "7", "start": change, "end": 700}]
    assert answer["meta_info"]["weight_version"] == "7"
    before = logp_of(model, PROMPT, output)[:change]
    torch.testing.assert_close(logprobs(answer)[:change], before, atol=1e-4, rtol=0)
    if mode == "retract":
        original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(other_tensors)
        after = logp_of(model, PROMPT, output)[change:]
        model.load_state_dict(original)
        torch.testing.assert_close(logprobs(answer)[change:], after, atol=1e-4, rtol=0)


def test_an_update_while_running_waits_for_the_running_requests(
    api: httpx.Client, pool: ThreadPoolExecutor, other_tensors: dict[str, torch.Tensor], write_weights: WriteWeights
) -> None:
    running = start_long(pool, api, "first", tokens=700)
    assert update(api, write_weights(other_tensors, 2), "2").status_code == 200
    assert running.result().json()["meta_info"]["weight_versions"] == [{"version": "0", "start": 0, "end": 700}]
    assert ask(api, "second", tokens=2).json()["meta_info"]["weight_version"] == "2"


def test_new_weights_are_served(
    api: httpx.Client, model: Qwen3ForCausalLM, other_tensors: dict[str, torch.Tensor], write_weights: WriteWeights
) -> None:
    assert update(api, write_weights(other_tensors, 3), "3").status_code == 200
    assert api.get("/model_info").json()["weight_version"] == "3"
    answer = greedy_first(api)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(other_tensors)
    want = logp_of(model, PROMPT, answer["output_ids"])
    model.load_state_dict(original)
    torch.testing.assert_close(logprobs(answer), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_digests_are_of_the_weights_as_received(
    api: httpx.Client,
    embedded_only: None,
    other_tensors: dict[str, torch.Tensor],
    write_weights: WriteWeights,
    dtype: torch.dtype,
) -> None:
    sent = {name: tensor.to(dtype) for name, tensor in other_tensors.items()}
    assert update(api, write_weights(sent, 4), "4").status_code == 200
    checksums = post(api, "/weights_checker", action="checksum").json()["checksums"]
    assert checksums == {name: tensor_digest(tensor) for name, tensor in sent.items()}


def test_checksums_tell_weights_apart_and_equal_weights_alike(
    api: httpx.Client,
    url: str,
    model: Qwen3ForCausalLM,
    other_tensors: dict[str, torch.Tensor],
    write_weights: WriteWeights,
) -> None:
    """One wrong number in a tensor changes only that tensor's checksum, under the engine's name of the fused tensor."""
    with EnginePool([url]) as engines:
        before = engines.checksums(url)
        update(api, write_weights(other_tensors, 3, "other"), "3").raise_for_status()
        assert all(before[name] != digest for name, digest in engines.checksums(url).items())
        nudged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        nudged["model.layers.1.self_attn.k_proj.weight"][3, 4] += 1e-4
        update(api, write_weights(nudged, 4, "nudged"), "4").raise_for_status()
        changed = [name for name, digest in engines.checksums(url).items() if before[name] != digest]
        assert len(changed) == 1 and changed[0].startswith("model.layers.1.self_attn")
        update(api, write_weights(dict(model.state_dict()), 5, "same"), "5").raise_for_status()
        assert engines.checksums(url) == before


def test_rewriting_the_folder_later_does_not_change_what_is_served(
    api: httpx.Client, other_tensors: dict[str, torch.Tensor], write_weights: WriteWeights
) -> None:
    folder = write_weights(other_tensors, 5)
    update(api, folder, "5")
    before = greedy_first(api)
    file = folder / "model.safetensors"
    with file.open("r+b") as handle:
        handle.seek(file.stat().st_size // 2)
        handle.write(b"\x3f" * (file.stat().st_size // 4))
    torch.testing.assert_close(logprobs(greedy_first(api)), logprobs(before), atol=1e-5, rtol=0)


def _spoil(tensors: dict[str, torch.Tensor], how: str) -> str:
    """Change the tensors in place. Return the text that the refusal must contain."""
    name = "model.layers.1.mlp.down_proj.weight"
    if how == "missing":
        del tensors[name]
    elif how == "unknown":
        tensors["model.layers.9.extra"] = torch.zeros(2)
        return "model.layers.9.extra"
    elif how == "shape":
        tensors[name] = tensors[name].T.contiguous()
    elif how == "dtype":
        tensors[name] = tensors[name].to(torch.int32)
    elif how == "nan":
        tensors[name][0, 0] = torch.nan
    return name


@pytest.mark.parametrize("how", ["missing", "unknown", "shape", "dtype", "nan"])
def test_a_wrong_tensor_is_refused_by_name_and_the_old_weights_keep_serving(
    api: httpx.Client,
    embedded_only: None,
    other_tensors: dict[str, torch.Tensor],
    write_weights: WriteWeights,
    how: str,
) -> None:
    before = greedy_first(api)
    name = _spoil(other_tensors, how)
    refused = update(api, write_weights(other_tensors, 9), "9")
    assert refused.status_code == 400
    assert name in refused.json()["message"]
    assert greedy_first(api) | {"meta_info": None} == before | {"meta_info": None}
    assert api.get("/model_info").json()["weight_version"] == "0"


def test_a_tensor_that_does_not_match_its_digest_is_refused(
    api: httpx.Client, embedded_only: None, other_tensors: dict[str, torch.Tensor], write_weights: WriteWeights
) -> None:
    folder = write_weights(other_tensors, 9)
    name = "model.layers.0.self_attn.q_proj.weight"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tensors"][name] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refused = update(api, folder, "9")
    assert refused.status_code == 400
    assert name in refused.json()["message"]
    assert api.get("/model_info").json()["weight_version"] == "0"


def test_a_manifest_of_another_version_is_refused(
    api: httpx.Client, embedded_only: None, other_tensors: dict[str, torch.Tensor], write_weights: WriteWeights
) -> None:
    refused = update(api, write_weights(other_tensors, 8), "9")
    assert refused.status_code == 400
    assert "version 8" in refused.json()["message"]


def test_a_truncated_file_is_refused(
    api: httpx.Client, embedded_only: None, other_tensors: dict[str, torch.Tensor], write_weights: WriteWeights
) -> None:
    folder = write_weights(other_tensors)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    before = greedy_first(api)
    refused = update(api, folder, "9")
    assert refused.status_code == 400
    assert str(file) in refused.json()["message"]
    assert greedy_first(api)["output_ids"] == before["output_ids"]


def test_a_bad_model_path_is_refused_and_the_old_weights_keep_serving(api: httpx.Client, tmp_path: Path) -> None:
    before = greedy_first(api)
    refused = update(api, tmp_path / "nowhere", "9")
    assert refused.status_code == 400
    assert "nowhere" in refused.json()["message"]
    assert greedy_first(api)["output_ids"] == before["output_ids"]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/pause_generation", {"mode": "gently"}, "mode"),
        ("/abort_request", {}, "rid"),
        ("/abort_request", {"rid": "a", "abort_all": True}, "rid"),
        ("/update_weights_from_disk", {"model_path": "/nowhere"}, "weight_version"),
        (
            "/update_weights_from_disk",
            {"model_path": "/x", "weight_version": "1", "load_format": "gguf"},
            "load_format",
        ),
        ("/weights_checker", {"action": "reset"}, "action"),
    ],
)
def test_a_malformed_control_request_is_refused_by_field(
    api: httpx.Client, embedded_only: None, path: str, body: dict[str, Any], field: str
) -> None:
    answer = api.post(path, json=body)
    assert answer.status_code == 400
    assert field in answer.json()["message"]


@pytest.mark.parametrize(
    ("path", "body"), [("/pause_generation", {"mode": "gently"}), ("/weights_checker", {"action": "zzz"})]
)
def test_a_malformed_control_request_is_refused_in_words(api: httpx.Client, path: str, body: dict[str, Any]) -> None:
    answer = api.post(path, json=body)
    assert 400 <= answer.status_code < 500
    assert len(error_message(answer)) > 10
