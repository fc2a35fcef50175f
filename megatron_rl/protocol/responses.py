"""Responses to /generate: each is checked against its request and becomes samples."""

import base64
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import orjson

from megatron_rl.errors import EngineError
from megatron_rl.protocol.generation import GenerationRequest, RoutedShape, Sample
from megatron_rl.types import COLUMNS, TokenIds

_FINISHED = ("stop", "length", "abort")
_ROUNDING = 1e-4  # a log-probability of a filtered distribution may exceed 0 by the rounding of its sum
_ANONYMOUS = 32  # hexadecimal digits of an id that SGLang made up
_KIB = 1 << 10

# Errors of Python and numpy for JSON that is not what was expected. The data come from another process.
_MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError)


class WrongResponse(EngineError):
    """The response does not fit its request. Another engine, or another attempt, may give the right one."""


def max_response_bytes(request: GenerationRequest) -> int:
    """Return a size that no right response to the request exceeds.

    It allows 1 KiB for each token, because the response may also hold the token's text.
    """
    prompt = len(request.prompt_tokens)
    token = _KIB * (1 + request.top_logprobs_num)
    routed = 0 if request.routed is None else 8 * request.routed.layers * request.routed.per_token
    tokens = request.sampling.max_new_tokens * (token + routed) + prompt * (_KIB + routed)
    return (1 << 20) + request.n * (64 * _KIB + tokens)


def read_samples(
    url: str, request: GenerationRequest, content: bytes, rid: str | None = None, vocab_size: int | None = None
) -> list[Sample]:
    """Return the samples of a response to /generate.

    Args:
        url: URL of the engine, for the error.
        request: the request.
        content: the JSON of the response.
        rid: id that was sent; None: the request's own.
        vocab_size: number of tokens of the model; None: ids are not compared with it.

    Raises:
        WrongResponse: the response is malformed, or does not fit the request.
        EngineError: the engine lacks something that the request needs.
    """
    of = f"{url} responded to request '{request.rid}'"
    try:
        response = orjson.loads(content)
    except ValueError as error:
        raise WrongResponse(f"{of} with what is no JSON: {content[:200]!r}") from error
    entries = response if isinstance(response, list) else [response]
    if len(entries) != request.n:
        raise WrongResponse(f"{of} with {len(entries)} samples, {request.n} were asked for")
    try:
        if request.routed is not None and any(_lacks_routing(entry) for entry in entries):
            raise EngineError(
                f"{url} does not report the experts it chose, which rollout.routing_replay asks for: start SGLang with "
                "--enable-return-routed-experts"
            )
        if any(entry["output_ids"] and entry["meta_info"].get("weight_versions") is None for entry in entries):
            raise EngineError(
                f"{url} does not report which weights sampled every token (weight_versions), "
                "so their staleness is unknown: use SGLang 0.5.23 or newer"
            )
        prompt = np.asarray(request.prompt_tokens).tolist()
        for at, entry in enumerate(entries):
            _check_belongs(entry, prompt, rid or request.rid, at, request.n)
        samples = [_sample(entry, request) for entry in entries]
        for sample in samples:
            _check_fits(sample, request, vocab_size)
    except _MALFORMED as error:
        raise WrongResponse(f"{of} in an unknown shape: {repr(error)[:300]}") from error
    except _Unfit as error:
        raise WrongResponse(f"{of} wrongly: {error}") from error
    return samples


class _Unfit(Exception):
    """A sample is well formed, but is not one of the request. The text says why."""


def _check_belongs(entry: dict[str, Any], prompt: list[int], rid: str, at: int, n: int) -> None:
    """Check that sample `at` of `n` belongs to the request with this id and prompt."""
    meta = entry["meta_info"]
    name, expected = meta["id"], rid if n == 1 else f"{rid}-{at}"
    if name != expected and not _is_anonymous(name):
        raise _Unfit(f"it is the response to '{str(name)[:100]}'")
    echo = entry.get("prompt_token_ids")
    if echo is not None and echo != prompt:
        raise _Unfit("it is the response to another prompt")
    if meta["finish_reason"]["type"] == "abort" and "prompt_tokens" not in meta:
        return  # SGLang does not count the prompt of a request that ended while it waited
    if meta["prompt_tokens"] != len(prompt):
        raise _Unfit(f"it is of a prompt of {str(meta['prompt_tokens'])[:100]} tokens, {len(prompt)} were sent")


def _is_anonymous(name: str) -> bool:
    """Return whether an id is one that SGLang made up."""
    return len(name) == _ANONYMOUS and int(name, 16) >= 0


def _check_fits(sample: Sample, request: GenerationRequest, vocab_size: int | None) -> None:
    """Check a sample against what was requested."""
    tokens, asked = sample.tokens, request.sampling.max_new_tokens
    if sample.finish_reason not in _FINISHED:
        raise _Unfit(f"finish_reason '{sample.finish_reason[:100]}' is not one of {', '.join(_FINISHED)}")
    if len(tokens) > asked:
        raise _Unfit(f"it has {len(tokens)} tokens, at most {asked} were asked for")
    if not len(tokens) and asked and sample.finish_reason != "abort":
        raise _Unfit(f"it has no token, but finish_reason '{sample.finish_reason}'")
    for name in ("tokens", "topk_ids"):
        ids = sample.columns.get(name)
        if vocab_size is not None and ids is not None and ids.size and ids.max() >= vocab_size:
            raise _Unfit(f"token {ids.max()} is outside the vocabulary of {vocab_size}")
    for scores in (sample.logmu, sample.columns.get("topk_logmu"), sample.prompt_logprobs):
        if scores is not None and (scores > _ROUNDING).any():
            raise _Unfit(f"log-probability {scores[scores > _ROUNDING][0]:g} is above 0")


def _sample(entry: dict[str, Any], request: GenerationRequest) -> Sample:
    meta = entry["meta_info"]
    tokens = _ids(entry["output_ids"])
    columns = {"tokens": tokens, "versions": _versions(meta, len(tokens))}
    if request.return_logprob:
        columns["logmu"] = _scores(meta["output_token_logprobs"], tokens, "output")
    if request.top_logprobs_num:
        columns["topk_ids"], columns["topk_logmu"] = _topk(
            meta["output_top_logprobs"], len(tokens), request.top_logprobs_num
        )
    for column in COLUMNS.values():
        if column.answer_key and column.answer_key in meta:
            columns[column.name] = values = _numbers(meta[column.answer_key]).astype(column.dtype)
            if values.shape != tokens.shape:
                raise ValueError(f"{column.answer_key} has shape {list(values.shape)} for {len(tokens)} tokens")
    prompt_logprobs = None
    if request.score_prompt:
        scored = meta["input_token_logprobs"]
        if not scored or scored[0][0] is not None:
            raise ValueError("input_token_logprobs do not begin with null")
        prompt_logprobs = _scores(scored, _ids(request.prompt_tokens), "input")[1:]
    finish = meta["finish_reason"]
    fault = (
        str(finish.get("message", "")) if finish["type"] == "abort" and (finish.get("status_code") or 0) >= 500 else ""
    )
    routing = None
    if request.routed is not None and meta.get("routed_experts") is not None:
        routing = _routing(meta["routed_experts"], len(request.prompt_tokens) + len(tokens) - 1, request.routed)
    retractions = int(meta.get("num_retractions") or 0)
    return Sample(columns, str(finish["type"]), fault, prompt_logprobs, retractions, routing)


def _ids(values: TokenIds) -> np.ndarray:
    """Return token ids as int32. Raise ValueError for other numbers."""
    ids = np.array(values)
    if ids.ndim != 1 or (len(ids) and (ids.dtype.kind != "i" or ids.min() < 0 or ids.max() >= 1 << 31)):
        raise ValueError("token ids are not a list of whole numbers")
    return ids.astype(np.int32)


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    """Return numbers as float32. Null becomes NaN. Raise ValueError for anything else, also for text of a number."""
    if set(map(type, values)) - {float, int, type(None)}:
        raise ValueError("a list of numbers holds something else")
    return np.array(values, np.float32)


def _scores(entries: list[list[Any]], tokens: np.ndarray, which: str) -> np.ndarray:
    """Return the log-probabilities of entries [logprob, token, text], float32. Null becomes NaN.

    Raise ValueError if they are not of these tokens.
    """
    # zip and numpy loop in C; a loop in Python would cost more than parsing the JSON.
    logprobs, scored = list(zip(*entries, strict=True))[:2] if entries else ((), ())
    if not np.array_equal(_ids(scored), tokens):
        raise ValueError(f"{which}_token_logprobs do not belong to {which}_ids")
    return _numbers(logprobs)


def _versions(meta: dict[str, Any], tokens: int) -> np.ndarray:
    """Return which weights sampled every token, int32. Raise ValueError if spans omit a token or count one twice."""
    spans = meta.get("weight_versions") or []  # SGLang sends no spans for a request that ended while it waited
    bounds = [0, *(int(span["end"]) for span in spans)]
    if [int(span["start"]) for span in spans] != bounds[:-1] or bounds[-1] != tokens:
        raise ValueError(f"weight_versions {spans} do not cover {tokens} tokens from end to end")
    return np.repeat(np.array([_version(span["version"]) for span in spans], np.int32), np.diff(bounds))


def _lacks_routing(entry: dict[str, Any]) -> bool:
    """Return whether a complete sample lacks its experts.

    If SGLang was started without the flag, it responds as if nothing had been requested.
    """
    meta = entry["meta_info"]
    return meta["finish_reason"]["type"] != "abort" and meta.get("routed_experts") is None


def _routing(coded: str, tokens: int, shape: RoutedShape) -> np.ndarray:
    """Decode base64 into [tokens, layers, per_token] int32.

    Raise ValueError for another size or for experts that are impossible.
    """
    flat = np.frombuffer(base64.b64decode(coded, validate=True), dtype=np.int32)
    if flat.size != tokens * shape.layers * shape.per_token:
        raise ValueError(
            f"routed_experts hold {flat.size} numbers for {tokens} tokens, {shape.layers} x {shape.per_token} each"
        )
    routing = flat.reshape(tokens, shape.layers, shape.per_token)
    ordered = np.sort(routing, -1)
    if tokens and (ordered.min() < 0 or ordered.max() >= shape.experts or (np.diff(ordered, axis=-1) == 0).any()):
        raise ValueError(f"routed_experts are not {shape.per_token} different ones of {shape.experts} for every token")
    return routing


def _topk(entries: list[list[list[Any]]], tokens: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and log-probabilities, [tokens, k], of k entries [logprob, token, text] per token.

    Raise ValueError if there are more or fewer.
    """
    if len(entries) != tokens or set(map(len, entries)) - {k}:
        raise ValueError(f"output_top_logprobs do not hold {k} entries for each of {tokens} tokens")
    logprobs, ids = list(zip(*chain.from_iterable(entries), strict=True))[:2] if entries else ((), ())
    return _ids(ids).reshape(tokens, k), _numbers(logprobs).reshape(tokens, k)


def _version(name: str) -> int:
    """Return the version number of a version name. SGLang calls weights as loaded "default": version 0."""
    number = 0 if name == "default" else int(name)
    if not 0 <= number < 1 << 31:
        raise ValueError(f"'{name}' is no weight version")
    return number
