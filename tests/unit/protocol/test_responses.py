"""The client checks a server's response to /generate and converts it into samples."""

import base64
from typing import Any

import numpy as np
import orjson
import pytest

from megatron_rl.errors import EngineError
from megatron_rl.protocol.generation import (
    GenerationRequest,
    RoutedShape,
    Sample,
    SamplingParams,
    generate_body,
)
from megatron_rl.protocol.responses import read_samples
from megatron_rl.sampling.group import check_samples

URL = "http://engine"
PLAIN = GenerationRequest("r", (1, 2), 1, SamplingParams(3))
TOP2 = GenerationRequest("r", (1, 2), 1, SamplingParams(3), top_logprobs_num=2)


def read(request: GenerationRequest, answered: Any) -> list[Sample]:
    return read_samples(URL, request, orjson.dumps(answered))


def answer(tops: list[list[list[Any]]] | None, tokens: tuple[int, ...] = (7, 9)) -> dict[str, Any]:
    meta = {
        "id": "r",
        "prompt_tokens": 2,
        "output_token_logprobs": [[-0.5, token, None] for token in tokens],
        "finish_reason": {"type": "length" if tokens else "abort"},
        "weight_version": "3",
        "weight_versions": [{"version": "3", "start": 0, "end": len(tokens)}],
    }
    return {"output_ids": list(tokens), "meta_info": meta if tops is None else {**meta, "output_top_logprobs": tops}}


def test_likeliest_tokens_are_read_as_columns() -> None:
    big = 2**31 - 1
    (sample,) = read(TOP2, answer([[[-0.25, big, "a"], [-1.5, 7, "b"]], [[-0.5, 9, None], [-2.0, 0, None]]]))
    ids, logmu = sample.columns["topk_ids"], sample.columns["topk_logmu"]
    assert (ids.dtype, logmu.dtype) == (np.int32, np.float32)
    assert ids.tolist() == [[big, 7], [9, 0]] and logmu.tolist() == [[-0.25, -1.5], [-0.5, -2.0]]


def test_a_sample_without_tokens_has_no_likeliest_ones() -> None:
    (sample,) = read(TOP2, answer([], ()))
    assert sample.columns["topk_ids"].shape == sample.columns["topk_logmu"].shape == (0, 2)


def test_likeliest_tokens_are_asked_for_and_read_only_when_wanted() -> None:
    assert "top_logprobs_num" not in generate_body(PLAIN, "r")
    assert generate_body(TOP2, "r")["top_logprobs_num"] == 2
    assert read(PLAIN, answer([[[-1.0, 1, None]]] * 2))[0].columns.keys() == {"tokens", "versions", "logmu"}


@pytest.mark.parametrize(
    "tops",
    [
        None,
        [[[-0.5, 7, None], [-1.0, 8, None]]],
        [[[-0.5, 7, None], [-1.0, 8, None]], [[-0.5, 9, None]]],
        [[[-0.5, 7, None], [-1.0, 8, None], [-2.0, 3, None]]] * 2,
        [[[-0.5, "seven", None], [-1.0, 8, None]]] * 2,
        [[[-0.5], [-1.0]]] * 2,
    ],
    ids=["none at all", "one position missing", "one entry missing", "one entry too many", "no token id", "no ids"],
)
def test_an_answer_with_other_than_k_tokens_at_every_position_is_refused(tops: Any) -> None:
    with pytest.raises(EngineError, match="http://engine responded to request 'r' in an unknown shape"):
        read(TOP2, answer(tops))


def test_a_likeliest_token_without_a_finite_log_probability_refuses_the_trajectory() -> None:
    samples = read(TOP2, answer([[[-0.5, 7, None], [None, 8, None]], [[-0.5, 9, None], [-1.0, 0, None]]]))
    assert np.isnan(samples[0].columns["topk_logmu"][0, 1])
    with pytest.raises(EngineError, match="non-finite behavior log-probabilities in trajectory 40"):
        check_samples(samples, 40)


def answer_of(*spans: tuple[int, int, int]) -> dict[str, Any]:
    made = answer(None)
    made["meta_info"]["weight_versions"] = [{"version": str(v), "start": start, "end": end} for v, start, end in spans]
    return made


def test_every_token_has_the_version_that_sampled_it() -> None:
    assert read(PLAIN, answer(None))[0].columns["versions"].tolist() == [3, 3]
    assert read(PLAIN, answer_of((2, 0, 1), (3, 1, 2)))[0].columns["versions"].tolist() == [2, 3]
    ended_while_it_waited = answer(None, ())
    del ended_while_it_waited["meta_info"]["weight_versions"]
    assert read(PLAIN, ended_while_it_waited)[0].columns["versions"].tolist() == []


def test_an_engine_that_tells_the_last_version_alone_is_refused() -> None:
    untold = answer(None)
    del untold["meta_info"]["weight_versions"]
    with pytest.raises(EngineError, match="http://engine does not report which weights sampled every token"):
        read(PLAIN, untold)


@pytest.mark.parametrize(
    "spans",
    [[], [(2, 0, 1)], [(2, 1, 2)], [(2, 0, 1), (3, 0, 2)], [(2, 0, 3)]],
    ids=["none", "the last token left out", "the first one left out", "one twice", "one too many"],
)
def test_versions_that_do_not_cover_every_token_once_are_refused(spans: list[tuple[int, int, int]]) -> None:
    with pytest.raises(EngineError, match=r"unknown shape.*weight_versions"):
        read(PLAIN, answer_of(*spans))


SCORED = GenerationRequest("r", (1, 2, 5), 1, SamplingParams(0), score_prompt=True)


def scored(entries: list[list[Any]]) -> dict[str, Any]:
    made = answer(None, ())
    made["meta_info"] |= {"input_token_logprobs": entries, "prompt_tokens": 3, "finish_reason": {"type": "length"}}
    return made


def test_a_prompt_is_scored_from_its_second_token_on() -> None:
    assert generate_body(SCORED, "r")["logprob_start_len"] == 0 and "logprob_start_len" not in generate_body(PLAIN, "r")
    (sample,) = read(SCORED, scored([[None, 1, None], [-0.5, 2, None], [None, 5, None]]))
    assert (
        sample.prompt_logprobs is not None and sample.prompt_logprobs[0] == -0.5 and np.isnan(sample.prompt_logprobs[1])
    )
    assert len(sample.tokens) == 0
    assert read(PLAIN, answer(None))[0].prompt_logprobs is None


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [[None, 1, None], [-0.5, 2, None]],
        [[None, 1, None], [-0.5, 7, None], [-0.5, 5, None]],
        [[-1.0, 1, None], [-0.5, 2, None], [-0.5, 5, None]],
    ],
    ids=["none at all", "one missing", "another token", "a first entry that nothing precedes"],
)
def test_scores_of_another_prompt_are_refused(entries: list[list[Any]]) -> None:
    with pytest.raises(EngineError, match="http://engine responded to request 'r' in an unknown shape"):
        read(SCORED, scored(entries))


ROUTED = GenerationRequest("r", (1, 2), 1, SamplingParams(3), return_logprob=False, routed=RoutedShape(2, 2, 4))
EXPERTS = np.array([[[0, 3], [1, 2]], [[3, 1], [0, 2]], [[2, 0], [3, 0]]], dtype=np.int32)  # for 2 + 2 - 1 tokens


def answer_with_experts(experts: np.ndarray | None, finish: str = "length") -> dict[str, Any]:
    out = answer(None)
    out["meta_info"]["finish_reason"] = {"type": finish}
    if experts is not None:
        out["meta_info"]["routed_experts"] = base64.b64encode(experts.tobytes()).decode()
    return out


def test_experts_are_asked_for_and_read_only_when_wanted() -> None:
    assert "return_routed_experts" not in generate_body(PLAIN, "r")
    assert generate_body(ROUTED, "r")["return_routed_experts"] is True
    assert read(PLAIN, answer_with_experts(EXPERTS))[0].routing is None
    (sample,) = read(ROUTED, answer_with_experts(EXPERTS))
    assert sample.routing is not None and sample.routing.dtype == np.int32
    assert np.array_equal(sample.routing, EXPERTS)


def test_an_engine_that_does_not_report_its_experts_is_refused_naming_the_flag() -> None:
    """SGLang responds with status 200 if it was started without the flag."""
    with pytest.raises(
        EngineError, match=r"http://engine does not report the experts .* --enable-return-routed-experts"
    ):
        read(ROUTED, answer_with_experts(None))


def test_an_aborted_sample_may_lack_its_experts() -> None:
    assert read(ROUTED, answer_with_experts(None, "abort"))[0].routing is None


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        (EXPERTS[:2], "hold 8 numbers for 3 tokens, 2 x 2 each"),
        (EXPERTS + 1, "not 2 different ones of 4"),
        (EXPERTS - 1, "not 2 different ones of 4"),
        (np.zeros_like(EXPERTS), "not 2 different ones of 4"),
        (EXPERTS.astype(np.int64), "hold 24 numbers"),
    ],
    ids=["a token missing", "above", "below", "twice the same", "other integers"],
)
def test_experts_that_cannot_be_are_refused(experts: np.ndarray, words: str) -> None:
    with pytest.raises(EngineError, match=rf"http://engine responded to request 'r' in an unknown shape: .*{words}"):
        read(ROUTED, answer_with_experts(experts))
