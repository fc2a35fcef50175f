"""POST /generate of a real server returns samples as specified."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from megatron_rl.protocol.generation import error_message
from tests.contract.conftest import EOS, VOCAB, logp_of

PROMPT = [5, 17, 250, 99, 3]


def generate(api: httpx.Client, prompt: Any = PROMPT, more: dict[str, Any] | None = None, **params: Any) -> Any:
    params = {"max_new_tokens": 12, "ignore_eos": True, **params}
    body = {"input_ids": prompt, "sampling_params": params, "return_logprob": True, **(more or {})}
    answer = api.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def logprobs(answer: dict[str, Any]) -> torch.Tensor:
    pairs = answer["meta_info"]["output_token_logprobs"]
    assert [pair[1] for pair in pairs] == answer["output_ids"]
    return torch.tensor([pair[0] for pair in pairs])


def test_one_prompt_gives_one_answer_in_sglangs_shape(api: httpx.Client, model_dir: Path) -> None:
    answer = generate(api, more={"rid": "one"})
    meta = answer["meta_info"]
    assert len(answer["output_ids"]) == meta["completion_tokens"] == 12
    assert meta["prompt_tokens"] == len(PROMPT)
    assert meta["id"] == "one"
    assert meta["finish_reason"] == {"type": "length", "length": 12}
    assert meta["weight_versions"] == [{"version": meta["weight_version"], "start": 0, "end": 12}]
    assert all(pair[2] is None for pair in meta["output_token_logprobs"])
    assert {"cached_tokens", "num_retractions"} <= meta.keys()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    assert answer["text"].strip() == tokenizer.decode(answer["output_ids"], skip_special_tokens=True)


def test_no_log_probabilities_are_sent_unless_asked_for(api: httpx.Client) -> None:
    assert "output_token_logprobs" not in generate(api, more={"return_logprob": False})["meta_info"]


def test_greedy_tokens_and_log_probs_are_those_of_a_plain_forward(api: httpx.Client, model: Qwen3ForCausalLM) -> None:
    answer = generate(api, temperature=0.0, max_new_tokens=20)
    output = answer["output_ids"]
    with torch.no_grad():
        best = model(torch.tensor([PROMPT + output])).logits[0].argmax(-1)
    assert best[len(PROMPT) - 1 : -1].tolist() == output
    torch.testing.assert_close(logprobs(answer), logp_of(model, PROMPT, output), atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_log_probs_are_after_temperature(api: httpx.Client, model: Qwen3ForCausalLM, temperature: float) -> None:
    answer = generate(api, temperature=temperature)
    want = logp_of(model, PROMPT, answer["output_ids"], temperature)
    torch.testing.assert_close(logprobs(answer), want, atol=1e-4, rtol=0)


def test_prompts_of_different_length_batched_together_keep_their_log_probs(
    api: httpx.Client, model: Qwen3ForCausalLM
) -> None:
    prompts = [[7], list(range(10, 60)), PROMPT, [4, 4, 4]]
    params = [{"max_new_tokens": 5 + 9 * at, "ignore_eos": True} for at in range(4)]
    body = {"input_ids": prompts, "sampling_params": params, "return_logprob": True, "rid": ["a", "b", "c", "d"]}
    answers = api.post("/generate", json=body).json()
    assert [answer["meta_info"]["id"] for answer in answers] == ["a", "b", "c", "d"]
    for prompt, param, answer in zip(prompts, params, answers, strict=True):
        assert len(answer["output_ids"]) == param["max_new_tokens"]
        torch.testing.assert_close(logprobs(answer), logp_of(model, prompt, answer["output_ids"]), atol=1e-4, rtol=0)


def test_requests_that_arrive_one_after_the_other_keep_their_log_probs(
    api: httpx.Client, model: Qwen3ForCausalLM
) -> None:
    prompts = [list(range(2 + at, 6 + 3 * at)) for at in range(10)]

    def late(at: int) -> Any:
        time.sleep(0.01 * at)
        return generate(api, prompts[at], max_new_tokens=30 - 2 * at, n=1 + at % 3)

    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(late, range(10)))
    for prompt, answers in zip(prompts, found, strict=True):
        for answer in answers if isinstance(answers, list) else [answers]:
            torch.testing.assert_close(
                logprobs(answer), logp_of(model, prompt, answer["output_ids"]), atol=1e-4, rtol=0
            )


def test_a_stop_token_ends_the_output_and_is_part_of_it(api: httpx.Client) -> None:
    greedy = generate(api, temperature=0.0, max_new_tokens=20)["output_ids"]
    stop = greedy[6]
    first = greedy.index(stop)
    answer = generate(api, temperature=0.0, max_new_tokens=20, stop_token_ids=[2, stop], ignore_eos=False)
    assert answer["output_ids"] == greedy[: first + 1]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_the_models_end_of_text_token_stops_unless_ignored(api: httpx.Client) -> None:
    stopped = list(generate(api, ignore_eos=False, temperature=4.0, n=32, max_new_tokens=200))
    ended = [answer for answer in stopped if answer["meta_info"]["finish_reason"]["type"] == "stop"]
    assert ended
    assert all(answer["output_ids"].index(EOS) == len(answer["output_ids"]) - 1 for answer in ended)
    ignoring = generate(api, ignore_eos=True, temperature=4.0, n=32, max_new_tokens=200)
    assert any(EOS in answer["output_ids"][:-1] for answer in ignoring)


def test_n_samples_come_as_a_list_and_differ(api: httpx.Client) -> None:
    answers = generate(api, n=6)
    assert len(answers) == 6
    assert len({tuple(answer["output_ids"]) for answer in answers}) == 6


def tokens_of(api: httpx.Client, **params: Any) -> list[list[int]]:
    return [answer["output_ids"] for answer in generate(api, n=4, **params)]


def test_a_seed_reproduces_the_samples(api: httpx.Client, embedded_only: None) -> None:
    assert tokens_of(api, sampling_seed=11) == tokens_of(api, sampling_seed=11)


def test_another_seed_and_no_seed_give_other_samples(api: httpx.Client) -> None:
    assert tokens_of(api, sampling_seed=11) != tokens_of(api, sampling_seed=12)
    assert tokens_of(api) != tokens_of(api)


def test_top_k_and_top_p_keep_the_likeliest_tokens(api: httpx.Client, engine: str, model: Qwen3ForCausalLM) -> None:
    """The embedded server reports log-probabilities of the filtered distribution, SGLang of the whole distribution."""
    with torch.no_grad():
        logp_V = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0, -1].float(), dim=-1)
    ordered = logp_V.sort(descending=True)
    top_p = 0.3
    kept = int(((ordered.values.exp().cumsum(0) - ordered.values.exp()) <= top_p).sum())
    for params, size in (({"top_k": 3}, 3), ({"top_p": top_p}, kept)):
        allowed = ordered.indices[:size].tolist()
        mass = ordered.values[:size].logsumexp(0)
        for answer in generate(api, n=64, max_new_tokens=1, **params):
            token = answer["output_ids"][0]
            assert token in allowed
            said = logp_V[token] - (mass if engine == "embedded" else 0)
            assert logprobs(answer)[0].item() == pytest.approx(said.item(), abs=1e-4)


def test_first_tokens_are_distributed_as_the_model_says(api: httpx.Client, model: Qwen3ForCausalLM) -> None:
    with torch.no_grad():
        p_V = torch.softmax(model(torch.tensor([PROMPT])).logits[0, -1].float(), dim=-1)
    draws = 4096
    tokens = [a["output_ids"][0] for a in generate(api, n=draws, max_new_tokens=1, sampling_seed=3)]
    seen_V = torch.bincount(torch.tensor(tokens), minlength=VOCAB) / draws
    worst = ((seen_V - p_V).abs() / (p_V * (1 - p_V) / draws).sqrt()).max().item()
    assert worst < 5.0, "a token's frequency is more than five standard deviations off"


def test_zero_new_tokens_scores_the_prompt(api: httpx.Client, model: Qwen3ForCausalLM) -> None:
    answer = generate(api, more={"logprob_start_len": 0}, max_new_tokens=0)
    scored = answer["meta_info"]["input_token_logprobs"]
    assert answer["output_ids"] == []
    assert scored[0] == [None, PROMPT[0], None]
    assert [entry[1] for entry in scored] == PROMPT
    want = logp_of(model, PROMPT[:1], PROMPT[1:])
    torch.testing.assert_close(torch.tensor([entry[0] for entry in scored[1:]]), want, atol=1e-4, rtol=0)


def test_a_batch_of_prompts_is_scored_as_each_alone(api: httpx.Client, model: Qwen3ForCausalLM) -> None:
    prompts = [PROMPT, list(range(20, 60)), [8, 9]]
    for prompt, answer in zip(
        prompts, generate(api, prompts, more={"logprob_start_len": 1}, max_new_tokens=0), strict=True
    ):
        scored = answer["meta_info"]["input_token_logprobs"]
        assert [entry[1] for entry in scored] == prompt[1:]
        want = logp_of(model, prompt[:2], prompt[2:])
        torch.testing.assert_close(torch.tensor([entry[0] for entry in scored[1:]]), want, atol=1e-4, rtol=0)


def test_many_requests_at_once_are_all_answered(api: httpx.Client) -> None:
    def one(at: int) -> tuple[int, int]:
        answers = generate(api, [2 + at, 3], more={"rid": f"many-{at}"}, n=2, max_new_tokens=1 + at % 7)
        return at, sum(len(answer["output_ids"]) for answer in answers)

    with ThreadPoolExecutor(40) as pool:
        assert sorted(pool.map(one, range(40))) == [(at, 2 * (1 + at % 7)) for at in range(40)]


def assert_top_logprobs(
    model: Qwen3ForCausalLM, prompt: list[int], answer: dict[str, Any], k: int, heat: float = 1.0
) -> None:
    """Assert that every output position reports the k most likely tokens of a plain forward pass, with its logp."""
    output, tops = answer["output_ids"], answer["meta_info"]["output_top_logprobs"]
    assert [len(entries) for entries in tops] == [k] * len(output)
    assert all(entry[2] is None for entries in tops for entry in entries)
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt + output])).logits[0].float() / heat
    logp_TV = torch.log_softmax(logits_TV[len(prompt) - 1 : -1], dim=-1)
    found_TK, ids_TK = (torch.tensor([[entry[at] for entry in entries] for entries in tops]) for at in (0, 1))
    torch.testing.assert_close(found_TK, logp_TV.topk(k).values, atol=1e-4, rtol=0)
    torch.testing.assert_close(found_TK, logp_TV.gather(1, ids_TK), atol=1e-4, rtol=0)
    assert all(len(set(row)) == k for row in ids_TK.tolist())


@pytest.mark.parametrize(("temperature", "k"), [(1.0, 1), (0.5, 5), (2.0, 64)])
def test_top_log_probs_are_those_of_the_distribution_sampled_from(
    api: httpx.Client, model: Qwen3ForCausalLM, temperature: float, k: int
) -> None:
    answer = generate(api, more={"top_logprobs_num": k}, temperature=temperature)
    assert_top_logprobs(model, PROMPT, answer, k, temperature)


def test_top_log_probs_agree_with_the_sampled_tokens_own(api: httpx.Client) -> None:
    answer = generate(api, more={"top_logprobs_num": 20}, max_new_tokens=60, temperature=0.7)
    sampled = zip(answer["meta_info"]["output_token_logprobs"], answer["meta_info"]["output_top_logprobs"], strict=True)
    both = [
        (logprob, {i: lp for lp, i, _ in top}[token])
        for (logprob, token, _), top in sampled
        if token in {e[1] for e in top}
    ]
    assert len(both) > 10
    assert all(mine == theirs for mine, theirs in both)


def test_no_top_log_probs_are_sent_unless_asked_for(api: httpx.Client) -> None:
    assert not generate(api)["meta_info"].get("output_top_logprobs")


def test_requests_with_and_without_top_log_probs_share_a_batch(api: httpx.Client, model: Qwen3ForCausalLM) -> None:
    """The requests arrive and end one after the other, so rows are joined, widened and compacted."""
    prompts, wanted = [list(range(2 + at, 6 + 3 * at)) for at in range(10)], [0, 3, 7, 0, 1, 12, 0, 5, 2, 0]

    def late(at: int) -> Any:
        time.sleep(0.01 * at)
        return generate(api, prompts[at], more={"top_logprobs_num": wanted[at]}, max_new_tokens=50 - 4 * at, n=2)

    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(late, range(10)))
    for prompt, k, answers in zip(prompts, wanted, found, strict=True):
        for answer in answers:
            torch.testing.assert_close(
                logprobs(answer), logp_of(model, prompt, answer["output_ids"]), atol=1e-4, rtol=0
            )
            if k:
                assert_top_logprobs(model, prompt, answer, k)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "input_ids"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [1, VOCAB]}, "input_ids"),
        ({"input_ids": [1, -1]}, "input_ids"),
        ({"input_ids": [1, "two"]}, "input_ids"),
        ({"input_ids": [[1], [2, None]]}, "input_ids"),
        ({"text": "hello"}, "text"),
        ({"input_ids": [1], "stream": True}, "stream"),
        ({"input_ids": [1], "sampling_parameters": {}}, "sampling_parameters"),
        ({"input_ids": [1], "sampling_params": {"temprature": 1}}, "sampling_params.temprature"),
        ({"input_ids": [1], "sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
        ({"input_ids": [1], "sampling_params": {"temperature": "hot"}}, "sampling_params.temperature"),
        ({"input_ids": [1], "sampling_params": {"top_p": 0}}, "sampling_params.top_p"),
        ({"input_ids": [1], "sampling_params": {"top_k": 0}}, "top_k"),
        ({"input_ids": [1], "sampling_params": {"n": 0}}, "sampling_params.n"),
        ({"input_ids": [1], "sampling_params": {"max_new_tokens": 2048}}, "max_new_tokens"),
        ({"input_ids": [1], "sampling_params": {"stop_token_ids": [VOCAB]}}, "stop_token_ids"),
        ({"input_ids": [1], "sampling_params": {"ignore_eos": True, "stop_token_ids": [2]}}, "ignore_eos"),
        ({"input_ids": [[1], [2]], "sampling_params": [{}]}, "sampling_params"),
        ({"input_ids": [[1], [2]], "sampling_params": [{}, {"best_of": 2}]}, "sampling_params.1.best_of"),
        ({"input_ids": [[1], [2]], "rid": ["a", "a"]}, "rid"),
        ({"input_ids": [1], "return_logprob": True, "logprob_start_len": 1}, "logprob_start_len"),
        ({"input_ids": [1], "top_logprobs_num": 2}, "return_logprob"),
        ({"input_ids": [1], "return_logprob": True, "top_logprobs_num": 65}, "top_logprobs_num"),
        ({"input_ids": [1], "return_logprob": True, "top_logprobs_num": -1}, "top_logprobs_num"),
        (
            {"input_ids": [1], "return_logprob": True, "top_logprobs_num": 2, "sampling_params": {"top_p": 0.9}},
            "top_logprobs_num",
        ),
        (
            {"input_ids": [1], "return_logprob": True, "top_logprobs_num": 2, "sampling_params": {"top_k": 5}},
            "top_logprobs_num",
        ),
        (
            {"input_ids": [1], "return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 0},
            "logprob_start_len",
        ),
    ],
)
def test_a_malformed_request_is_refused_by_field(
    api: httpx.Client, embedded_only: None, body: dict[str, Any], field: str
) -> None:
    answer = api.post("/generate", json=body)
    assert answer.status_code == 400
    assert field in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input_ids": []},
        {"input_ids": [1, "two"]},
        {"input_ids": [[1], [2, None]]},
        {"input_ids": [1], "sampling_params": {"temprature": 1}},
        {"input_ids": [1], "sampling_params": {"temperature": -1}},
        {"input_ids": [1], "sampling_params": {"temperature": "hot"}},
        {"input_ids": [1], "sampling_params": {"top_p": 0}},
        {"input_ids": [1], "sampling_params": {"top_k": 0}},
        {"input_ids": [1], "sampling_params": {"max_new_tokens": 2048}},
        {"input_ids": [[1], [2]], "rid": ["a", "a"]},
    ],
)
def test_a_malformed_request_is_refused_in_words_and_the_next_one_is_answered(
    api: httpx.Client, body: dict[str, Any]
) -> None:
    answer = api.post("/generate", json=body)
    assert 400 <= answer.status_code < 500
    assert len(error_message(answer)) > 10
    assert len(generate(api, max_new_tokens=1)["output_ids"]) == 1


def test_a_body_that_is_not_json_is_refused(api: httpx.Client) -> None:
    assert api.post("/generate", content=b"{", headers={"content-type": "application/json"}).status_code == 400


def test_all_log_probs_are_finite_and_not_positive(api: httpx.Client) -> None:
    for answer in generate(api, n=16, temperature=0.05, max_new_tokens=30):
        assert all(math.isfinite(lp) and lp <= 0 for lp in logprobs(answer).tolist())
