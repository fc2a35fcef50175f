"""SGLang's /generate request and response: what the client and a server exchange, and its JSON."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import httpx
import numpy as np
import orjson

from megatron_rl.errors import EngineError
from megatron_rl.types import COLUMNS, TokenIds


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. top_p 1 and top_k -1 keep the model's own distribution, as training needs.

    Attributes:
        max_new_tokens: maximum number of tokens to generate.
        temperature: 0 is greedy.
        top_p: 1 is off.
        top_k: -1 is off.
        stop_token_ids: stop tokens in addition to the model's end-of-text tokens.
        ignore_eos: do not stop at end-of-text tokens.
        seed: None: the engine draws one.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None


class RoutedShape(NamedTuple):
    """The routing an engine must report: `per_token` of `experts` for every token, in each of `layers` layers."""

    layers: int
    per_token: int
    experts: int


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and the n samples to generate from it.

    Attributes:
        rid: id that is unique among the requests of one call.
        prompt_tokens: token ids of the prompt.
        n: number of samples.
        sampling: how to sample.
        return_logprob: report the log-probabilities of the sampled tokens.
        top_logprobs_num: the K of the columns topk_ids and topk_logmu, 0 for none. Needs return_logprob.
        score_prompt: also score the prompt's own tokens, at temperature 1. Needs return_logprob.
        routed: shape of the experts to report for every token. None: do not report them.
    """

    rid: str
    prompt_tokens: TokenIds
    n: int
    sampling: SamplingParams
    return_logprob: bool = True
    top_logprobs_num: int = 0
    score_prompt: bool = False
    routed: RoutedShape | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One response, token for token as the engine returned it (including the stop token).

    Attributes:
        columns: the engine's columns of the R response tokens by name; see `types.COLUMNS`. Always tokens [R] int32 and
            versions [R] int32; logmu [R] float32 and topk_* [R, K] if requested, NaN where the engine had no finite
            number.
        finish_reason: "stop", "length" or "abort".
        fault: what failed inside the engine, "" if nothing did.
        prompt_logprobs: [P - 1] float32, log-probabilities of the prompt's tokens after the first. None if not
            requested; NaN as in logmu.
        retractions: how often the engine put the sample back into its queue.
        routing: as in `Trajectory`, for the request's prompt and these tokens. None if not requested, or if not
            reported, as is possible for an aborted sample.
    """

    columns: Mapping[str, np.ndarray]
    finish_reason: str
    fault: str = ""
    prompt_logprobs: np.ndarray | None = None
    retractions: int = 0
    routing: np.ndarray | None = field(default=None)

    @property
    def tokens(self) -> np.ndarray:
        """Token ids of the response, [R] int32."""
        return self.columns["tokens"]

    @property
    def logmu(self) -> np.ndarray | None:
        """Log-probabilities of the tokens, [R] float32; None if not requested."""
        return self.columns.get("logmu")


def generate_body(request: GenerationRequest, rid: str) -> dict[str, Any]:
    """Return the body of a /generate request with the id `rid`. It holds an array: encode it with `to_json`."""
    sampling = request.sampling
    params: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_new_tokens": sampling.max_new_tokens,
        "n": request.n,
    }
    if sampling.stop_token_ids:
        params["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.ignore_eos:
        params["ignore_eos"] = True
    if sampling.seed is not None:
        params["sampling_seed"] = sampling.seed
    body = {
        "rid": rid,
        "input_ids": np.asarray(request.prompt_tokens, np.int32),
        "sampling_params": params,
        "return_logprob": request.return_logprob,
    }
    if request.top_logprobs_num:
        body["top_logprobs_num"] = request.top_logprobs_num
    if request.score_prompt:
        body["logprob_start_len"] = 0
    if request.routed is not None:
        body["return_routed_experts"] = True
    return body


def to_json(body: Any) -> bytes:
    """Return JSON. Arrays of numpy are written as lists."""
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def read_samples(url: str, request: GenerationRequest, content: bytes) -> list[Sample]:
    """Return the samples of an answer to /generate.

    Args:
        url: URL of the engine, for the error.
        request: the request.
        content: the JSON of the response.

    Raises:
        EngineError: the answer is malformed.
    """
    try:
        answer = orjson.loads(content)
    except ValueError as error:
        raise EngineError(f"{url}/generate did not answer in JSON: {content[:200]!r}") from error
    entries = answer if isinstance(answer, list) else [answer]
    if len(entries) != request.n:
        raise EngineError(f"{url} gave {len(entries)} samples for request '{request.rid}', {request.n} were asked for")
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
        return [_sample(entry, request) for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"{url} answered request '{request.rid}' in an unknown shape: {error!r}") from error


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
            columns[column.name] = values = np.array(meta[column.answer_key], column.dtype)
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


def _scores(entries: list[list[Any]], tokens: np.ndarray, which: str) -> np.ndarray:
    """Return the log-probabilities of entries [logprob, token, text], float32. Null becomes NaN.

    Raise ValueError if they are not of these tokens.
    """
    # zip and numpy loop in C; a loop in Python would cost more than parsing the JSON.
    logprobs, scored = list(zip(*entries, strict=True))[:2] if entries else ((), ())
    if not np.array_equal(_ids(scored), tokens):
        raise ValueError(f"{which}_token_logprobs do not belong to {which}_ids")
    return np.array(logprobs, np.float32)


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
    return _ids(ids).reshape(tokens, k), np.array(logprobs, np.float32).reshape(tokens, k)


def _version(name: str) -> int:
    """Return the version number of a version name. SGLang calls weights as loaded "default": version 0."""
    return 0 if name == "default" else int(name)


def error_message(response: httpx.Response) -> str:
    """Return the error message of a response: that of its JSON body, or the first 500 characters of another body."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:500]
    if isinstance(body, dict):
        inner = body.get("error")
        return str(body.get("message") or (inner.get("message") if isinstance(inner, dict) else inner) or body)
    return str(body)
