"""SGLang's /generate request and response: what the client and a server exchange, and its JSON."""

import base64
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx
import numpy as np

from megatron_rl.errors import EngineError
from megatron_rl.types import TopK, VersionSpan


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
        top_logprobs_num: the K of `Sample.topk`, 0 for none. Needs return_logprob.
        score_prompt: also score the prompt's own tokens, at temperature 1. Needs return_logprob.
        routed: shape of the experts to report for every token. None: do not report them.
    """

    rid: str
    prompt_tokens: tuple[int, ...]
    n: int
    sampling: SamplingParams
    return_logprob: bool = True
    top_logprobs_num: int = 0
    score_prompt: bool = False
    routed: RoutedShape | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One response, token for token as the engine returned it (including the stop token).

    Attributes:
        tokens: token ids of the response.
        logprobs: log-probabilities of the tokens. None if not requested; NaN where the engine had no finite number.
        finish_reason: "stop", "length" or "abort".
        versions: which weights sampled which tokens.
        fault: what failed inside the engine, "" if nothing did.
        topk: the likeliest tokens of the distribution sampled from, at every position. None if not requested; NaN as in
            logprobs. Not compared.
        prompt_logprobs: log-probabilities of the prompt's tokens after the first. None if not requested; NaN as in
            logprobs.
        retractions: how often the engine put the sample back into its queue.
        routing: as in `Trajectory`, for the request's prompt and these tokens. None if not requested, or if not
            reported, as is possible for an aborted sample. Not compared.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: str
    versions: tuple[VersionSpan, ...]
    fault: str = ""
    topk: TopK | None = field(default=None, compare=False)
    prompt_logprobs: tuple[float, ...] | None = None
    retractions: int = 0
    routing: np.ndarray | None = field(default=None, compare=False)


def generate_body(request: GenerationRequest, rid: str) -> dict[str, Any]:
    """Return the JSON body of a /generate request with the id `rid`."""
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
        "input_ids": list(request.prompt_tokens),
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


def read_samples(url: str, request: GenerationRequest, answer: Any) -> list[Sample]:
    """Return the samples of an answer to /generate.

    Args:
        url: URL of the engine, for the error.
        request: the request.
        answer: the JSON of the response.

    Raises:
        EngineError: the answer is malformed.
    """
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
    tokens = tuple(int(token) for token in entry["output_ids"])
    logprobs = None
    if request.return_logprob:
        pairs = meta["output_token_logprobs"]
        if tuple(pair[1] for pair in pairs) != tokens:
            raise ValueError("output_token_logprobs do not belong to output_ids")
        logprobs = tuple(math.nan if pair[0] is None else float(pair[0]) for pair in pairs)
    prompt_logprobs = None
    if request.score_prompt:
        scored = meta["input_token_logprobs"]
        if tuple(entry[1] for entry in scored) != request.prompt_tokens or scored[0][0] is not None:
            raise ValueError("input_token_logprobs do not belong to input_ids, or do not begin with null")
        prompt_logprobs = tuple(math.nan if entry[0] is None else float(entry[0]) for entry in scored[1:])
    topk = None
    if request.top_logprobs_num:
        topk = _topk(meta["output_top_logprobs"], len(tokens), request.top_logprobs_num)
    finish = meta["finish_reason"]
    versions = _versions(meta, len(tokens))
    fault = (
        str(finish.get("message", "")) if finish["type"] == "abort" and (finish.get("status_code") or 0) >= 500 else ""
    )
    retractions = int(meta.get("num_retractions") or 0)
    routing = None
    if request.routed is not None and meta.get("routed_experts") is not None:
        routing = _routing(meta["routed_experts"], len(request.prompt_tokens) + len(tokens) - 1, request.routed)
    return Sample(tokens, logprobs, str(finish["type"]), versions, fault, topk, prompt_logprobs, retractions, routing)


def _versions(meta: dict[str, Any], tokens: int) -> tuple[VersionSpan, ...]:
    """Return which weights sampled every token. Raise ValueError if the spans omit a token or count one twice."""
    spans = meta.get("weight_versions")
    if spans is None:  # SGLang sends no spans for a request that ended while it waited
        spans = [{"version": meta["weight_version"], "start": 0, "end": 0}]
    versions = tuple(VersionSpan(_version(s["version"]), int(s["start"]), int(s["end"])) for s in spans)
    bounds = [0, *(span.end for span in versions)]
    if [span.start for span in versions] != bounds[:-1] or bounds[-1] != tokens:
        raise ValueError(f"weight_versions {spans} do not cover {tokens} tokens from end to end")
    return versions


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


def _topk(entries: list[list[list[Any]]], tokens: int, k: int) -> TopK:
    """Convert one list of k entries [logprob, token, text] per token. Raise ValueError if there are more or fewer."""
    if len(entries) != tokens or any(len(likeliest) != k for likeliest in entries):
        raise ValueError(f"output_top_logprobs do not hold {k} entries for each of {tokens} tokens")
    # float64 represents integers below 2^53 exactly; None becomes NaN.
    pairs_RK2 = np.array([[pair[:2] for pair in likeliest] for likeliest in entries], dtype=np.float64).reshape(
        tokens, k, 2
    )
    return TopK(pairs_RK2[..., 1].astype(np.int32), pairs_RK2[..., 0].astype(np.float32))


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
