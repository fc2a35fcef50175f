"""Responses that engines gave, or may give, and what the trainer's client must make of each.

`tests/unit/engines/test_engine_responses.py` sends each one over HTTP.
"""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

VOCAB = 50
Right = dict[str, Any]  # the right response: one sample, or its `meta_info`


@dataclass(frozen=True)
class WrongSample:
    """A response to /generate that is wrong. The request is redone elsewhere; if all are wrong, that is an EngineError.

    Attributes:
        name: what is wrong.
        spoil: returns the wrong response, made of the right one: JSON data, or the bytes of the body.
        words: what the error says, besides engine and request.
        source: address of the public report of a user.
        headers: headers of the response.
        n: number of samples in the request.
        more: further fields of the request.
    """

    name: str
    spoil: Callable[[Any], Any]
    words: str
    source: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    n: int = 1
    more: dict[str, Any] = field(default_factory=dict)


def _with(**fields: Any) -> Callable[[Right], Right]:
    return lambda right: {**right, **fields}


def _meta(**fields: Any) -> Callable[[Right], Right]:
    return lambda right: {**right, "meta_info": {**right["meta_info"], **fields}}


def _without(*fields: str) -> Callable[[Right], Right]:
    return lambda right: {
        **right,
        "meta_info": {name: value for name, value in right["meta_info"].items() if name not in fields},
    }


def _tokens(*tokens: Any, logprob: Any = -0.5, reason: str = "length") -> Callable[[Right], Right]:
    """Return a response with these tokens, whose other fields agree with them."""

    def spoil(right: Right) -> Right:
        spans = [{"version": "0", "start": 0, "end": len(tokens)}] if tokens else []
        entries = [[logprob, token, None] for token in tokens]
        fields = {"output_token_logprobs": entries, "weight_versions": spans, "finish_reason": {"type": reason}}
        return {**right, "output_ids": list(tokens), "meta_info": {**right["meta_info"], **fields}}

    return spoil


def _spans(*spans: tuple[Any, Any, Any]) -> Callable[[Right], Right]:
    return _meta(weight_versions=[{"version": v, "start": start, "end": end} for v, start, end in spans])


_MALFORMED = "in an unknown shape"
_TOP2 = {"top_logprobs_num": 2}

WRONG_SAMPLES = [
    # It is the response to another request.
    WrongSample("the id of another request", _meta(id="s1-t9"), "it is the response to 's1-t9'"),
    WrongSample("the id of another attempt", _meta(id="s1-t0~7"), "it is the response to 's1-t0~7'"),
    WrongSample("no id", _without("id"), "KeyError"),
    WrongSample("an id that is no text", _meta(id=7), _MALFORMED),
    WrongSample("a prompt of another length", _meta(prompt_tokens=9), "a prompt of 9 tokens, 3 were sent"),
    WrongSample("no length of the prompt", _without("prompt_tokens"), "KeyError"),
    WrongSample("the prompt length null", _meta(prompt_tokens=None), "a prompt of None tokens"),
    WrongSample(
        "another prompt of the same length, under an id that SGLang made up",
        lambda right: [
            {**one, "prompt_token_ids": [3, 4, 6], "meta_info": {**one["meta_info"], "id": "0" * 32}} for one in right
        ],
        "the response to another prompt",
        n=2,
    ),
    WrongSample("samples in another order", lambda right: right[::-1], "it is the response to 's1-t0", n=2),
    # The number of samples or tokens.
    WrongSample("two samples for one", lambda right: [right, right], "2 samples, 1 were asked for"),
    WrongSample("one sample for two", lambda right: right[:1], "1 samples, 2 were asked for", n=2),
    WrongSample("no sample", lambda right: [], "0 samples"),
    WrongSample("more tokens than asked for", _tokens(*[7] * 40), "40 tokens, at most 6 were asked for"),
    WrongSample("no token, but finished", _tokens(reason="stop"), "no token, but finish_reason 'stop'"),
    WrongSample("no token, but the full length", _tokens(), "no token, but finish_reason 'length'"),
    # Token ids.
    WrongSample("an id outside the vocabulary", _tokens(7, VOCAB), f"token {VOCAB} is outside the vocabulary"),
    WrongSample("a negative id", _tokens(7, -1), _MALFORMED),
    WrongSample("an id of 2**31", _tokens(7, 1 << 31), _MALFORMED),
    WrongSample("an id beyond 2**63", _tokens(7, 1 << 63), _MALFORMED),
    WrongSample("an id that is a fraction", _tokens(7, 7.5), _MALFORMED),
    WrongSample("an id that is text", _tokens(7, "7"), _MALFORMED),
    WrongSample("ids that are true", _tokens(True, True), _MALFORMED),
    WrongSample("an id that is null", _tokens(7, None), _MALFORMED),
    WrongSample("an id that is a list", _tokens(7, [7]), _MALFORMED),
    WrongSample("an id of Infinity", _tokens(7, float("inf")), "no JSON"),
    WrongSample("an id of 1e400", lambda right: json.dumps(right).replace("[7, 8]", "[7, 1e400]").encode(), "request"),
    WrongSample("output_ids null", _with(output_ids=None), _MALFORMED),
    WrongSample("output_ids a number", _with(output_ids=7), _MALFORMED),
    WrongSample("output_ids a text", _with(output_ids="78"), _MALFORMED),
    WrongSample("output_ids an object", _with(output_ids={"0": 7}), _MALFORMED),
    WrongSample("no output_ids", lambda right: {"meta_info": right["meta_info"]}, _MALFORMED),
    # Log-probabilities.
    WrongSample("log p above 0", _tokens(7, 8, logprob=0.5), r"log-probability 0\.5 is above 0"),
    WrongSample("log p that is text", _tokens(7, 8, logprob="-0.5"), _MALFORMED),
    WrongSample("log p that is true", _tokens(7, 8, logprob=True), _MALFORMED),
    WrongSample("log p that is a list", _tokens(7, 8, logprob=[-0.5]), _MALFORMED),
    WrongSample("empty pairs", _meta(output_token_logprobs=[[], []]), _MALFORMED),
    WrongSample("pairs without a token", _meta(output_token_logprobs=[[-0.5], [-0.5]]), _MALFORMED),
    WrongSample("pairs of different lengths", _meta(output_token_logprobs=[[-0.5, 7], [-0.5, 8, None]]), _MALFORMED),
    WrongSample("log p of other tokens", _meta(output_token_logprobs=[[-0.5, 8, None]] * 2), "do not belong"),
    WrongSample("log p of fewer tokens", _meta(output_token_logprobs=[[-0.5, 7, None]]), "do not belong"),
    WrongSample("log p null", _meta(output_token_logprobs=None), _MALFORMED),
    WrongSample("log p a text", _meta(output_token_logprobs="none"), _MALFORMED),
    WrongSample("log p of numbers alone", _meta(output_token_logprobs=[-0.5, -0.5]), _MALFORMED),
    WrongSample("no log p", _without("output_token_logprobs"), _MALFORMED),
    WrongSample(
        "a likeliest token outside the vocabulary",
        _meta(output_top_logprobs=[[[-0.5, 7, None], [-0.5, VOCAB, None]]] * 2),
        "outside the vocabulary",
        more=_TOP2,
    ),
    WrongSample(
        "log p of a likeliest token above 0",
        _meta(output_top_logprobs=[[[0.5, 7, None], [-0.5, 8, None]]] * 2),
        "above 0",
        more=_TOP2,
    ),
    WrongSample("likeliest tokens null", _meta(output_top_logprobs=None), _MALFORMED, more=_TOP2),
    # meta_info and the rest of the shape.
    WrongSample("meta_info null", _with(meta_info=None), _MALFORMED),
    WrongSample("meta_info a list", _with(meta_info=[1]), _MALFORMED),
    WrongSample("meta_info a text", _with(meta_info="x"), _MALFORMED),
    WrongSample("no meta_info", lambda right: {"output_ids": [7, 8]}, _MALFORMED),
    WrongSample("an unknown finish_reason", _meta(finish_reason={"type": "tired"}), "finish_reason 'tired'"),
    WrongSample("finish_reason null", _meta(finish_reason=None), _MALFORMED),
    WrongSample("finish_reason a text", _meta(finish_reason="stop"), _MALFORMED),
    WrongSample("finish_reason without its type", _meta(finish_reason={}), _MALFORMED),
    WrongSample("a status that is text", _meta(finish_reason={"type": "abort", "status_code": "x"}), _MALFORMED),
    WrongSample("retractions a list", _meta(num_retractions=[1]), _MALFORMED),
    WrongSample("versions a number", _meta(weight_versions=3), _MALFORMED),
    WrongSample("no version of a token", _spans(("0", 0, 1)), "do not cover 2 tokens"),
    WrongSample("a version that is no number", _spans(("new", 0, 2)), _MALFORMED),
    WrongSample("a version below 0", _spans(("-1", 0, 2)), "no weight version"),
    WrongSample("a version of 2**40", _spans((str(1 << 40), 0, 2)), "no weight version"),
    WrongSample("spans that run backwards", _spans(("0", 0, 3), ("0", 3, 2)), _MALFORMED),
    WrongSample("spans that are text", _meta(weight_versions=["0"]), _MALFORMED),
    WrongSample("a text", lambda right: "hello", _MALFORMED),
    WrongSample("null", lambda right: None, _MALFORMED),
    WrongSample("a number", lambda right: 7, _MALFORMED),
    WrongSample("a list of lists", lambda right: [[right]], _MALFORMED),
    WrongSample("HTML", lambda right: b"<html>busy</html>", "no JSON"),
    WrongSample("nothing", lambda right: b"", "no JSON"),
    WrongSample("half of it", lambda right: json.dumps(right).encode()[:-20], "no JSON"),
    WrongSample("100,000 brackets", lambda right: b"[" * 100_000 + b"]" * 100_000, "request"),
    WrongSample("no UTF-8", lambda right: json.dumps(right).encode() + b"\xff", "no JSON"),
    WrongSample(
        "garbage that says it is gzip", lambda right: b"no gzip", "wrongly", headers={"content-encoding": "gzip"}
    ),
    WrongSample("8 MiB for six tokens", lambda right: json.dumps(right).encode() + b" " * (1 << 23), "more than"),
    WrongSample(
        "8 MiB in 8 KiB of gzip",
        lambda right: gzip.compress(json.dumps(right).encode() + b" " * (1 << 23)),
        "more than",
        headers={"content-encoding": "gzip"},
    ),
]


@dataclass(frozen=True)
class Status:
    """A status with which a server responds, and the right outcome.

    Attributes:
        status: the HTTP status.
        outcome: "later": the same server is asked again; "retry": it is asked again a few times, if it is healthy;
            "refused": an EngineError at once.
        headers: headers of the response.
        source: address of the public report of a user.
    """

    status: int
    outcome: Literal["later", "retry", "refused"]
    headers: dict[str, str] = field(default_factory=dict)
    source: str = ""


STATUSES = [
    Status(429, "later", source="https://github.com/sgl-project/sglang/pull/31802"),
    Status(429, "later", {"retry-after": "1"}, source="https://github.com/smg-project/smg/pull/2247"),
    Status(429, "later", {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}),
    Status(429, "later", {"retry-after": "soon"}),
    Status(408, "later", source="https://github.com/smg-project/smg/pull/2247"),
    Status(425, "later"),
    Status(409, "later"),
    Status(503, "later", {"retry-after": "0"}),
    Status(503, "retry"),
    Status(500, "retry"),
    Status(502, "retry"),
    Status(504, "retry"),
    Status(400, "refused"),
    Status(401, "refused"),
    Status(404, "refused"),
    Status(413, "refused"),
    Status(422, "refused"),
]


@dataclass(frozen=True)
class WrongControl:
    """A response to a control call that is wrong: an EngineError that names the engine.

    Attributes:
        name: what is wrong.
        method: the method of the pool that makes the call.
        body: the body of the response: JSON data, or bytes.
        headers: headers of the response.
        arguments: further arguments of the method.
    """

    name: str
    method: str
    body: Any
    headers: dict[str, str] = field(default_factory=dict)
    arguments: tuple[Any, ...] = ()


_GZIP = {"content-encoding": "gzip"}
_SCORED = {
    "output_ids": [],
    "meta_info": {
        "prompt_tokens": 3,
        "finish_reason": {"type": "length"},
        "input_token_logprobs": [[None, 3, None], [-0.5, 4, None], [-0.5, 5, None]],
    },
}

WRONG_CONTROLS = [
    WrongControl("garbage that says it is gzip", "resume", b"no gzip", _GZIP),
    WrongControl("garbage that says it is gzip, to a query", "weight_version", b"no gzip", _GZIP),
    WrongControl("a failure with status 200", "flush", {"success": False, "message": "busy"}),
    WrongControl("checksums a list", "checksums", {"checksums": ["a"]}),
    WrongControl("checksums null", "checksums", {"checksums": None}),
    WrongControl("checksums of numbers", "checksums", {"checksums": {"a": 7}}),
    WrongControl("no checksums", "checksums", {}),
    WrongControl("checksums in plain text", "checksums", b"ok"),
    WrongControl("ranks a number", "checksums", {"ranks": 7}),
    WrongControl("ranks of numbers", "checksums", {"ranks": [7]}),
    WrongControl("a rank without checksums", "checksums", {"ranks": [{}]}),
    WrongControl("a rank whose checksums are a list", "checksums", {"ranks": [{"checksums": ["a"]}]}),
    WrongControl("model_info a list", "weight_version", ["0"]),
    WrongControl("model_info without the version", "weight_version", {}),
    WrongControl("model_info null", "info", None),
    WrongControl("model_info a list of numbers", "info", [1]),
    WrongControl("tp_size a text", "traits", {"dtype": "float32", "device": "cpu", "tp_size": "two"}),
    WrongControl("tp_size 0", "traits", {"dtype": "float32", "device": "cpu", "tp_size": 0}),
    WrongControl("no device", "traits", {"dtype": "float32", "tp_size": 1}),
    WrongControl("scores without an id", "score", _SCORED, arguments=((3, 4, 5),)),
    WrongControl("scores null", "score", {"meta_info": None}, arguments=((3, 4, 5),)),
    WrongControl("scores a list of numbers", "score", [1], arguments=((3, 4, 5),)),
    WrongControl("nothing for scores", "score", b"", arguments=((3, 4, 5),)),
]
