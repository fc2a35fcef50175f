"""What travels between the client and a server, and its JSON: SGLang's /generate request and answer."""

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
    """temperature 0 is greedy. top_p 1 and top_k -1 keep the model's own distribution: what training wants.

    stop_token_ids are added to the model's end-of-text tokens. seed None: the engine draws one.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None


class RoutedShape(NamedTuple):
    """What an engine must report of its experts: `per_token` of `experts` for every token, in each of `layers` layers."""

    layers: int
    per_token: int
    experts: int


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and n samples of it. rid: unique among the requests of one call.

    top_logprobs_num: the K of `Sample.topk`, 0 for none; needs return_logprob. score_prompt: score the prompt's own tokens,
    too, at temperature 1; needs return_logprob. routed: ask for the experts chosen for every token; None: do not.
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
    """One response, token for token as the engine gave it (the stop token included).

    logprobs: None when not asked for; NaN where the engine had no finite number. finish_reason: "stop",
    "length" or "abort". fault: what went wrong inside the engine, "" when nothing did. topk: at every position the
    likeliest tokens of the distribution sampled from, None when not asked for, NaN as in logprobs; not compared.
    prompt_logprobs: of the prompt's tokens after the first, None when not asked for, NaN as in logprobs.
    retractions: how often the engine put it back into its queue. routing: as in `Trajectory`, of the request's prompt and these
    tokens; None when not asked for, or not told, as may be of an aborted sample; not compared.
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
                f"{url} does not say which weights sampled every token (weight_versions), without which nobody knows how stale "
                "they are: take SGLang 0.5.23 or newer"
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
    """Which weights sampled every token; ValueError for spans that leave one out or count one twice."""
    spans = meta.get("weight_versions")
    if spans is None:  # SGLang, of a request that ended while it waited
        spans = [{"version": meta["weight_version"], "start": 0, "end": 0}]
    versions = tuple(VersionSpan(_version(s["version"]), int(s["start"]), int(s["end"])) for s in spans)
    bounds = [0, *(span.end for span in versions)]
    if [span.start for span in versions] != bounds[:-1] or bounds[-1] != tokens:
        raise ValueError(f"weight_versions {spans} do not cover {tokens} tokens from end to end")
    return versions


def _lacks_routing(entry: dict[str, Any]) -> bool:
    """SGLang answers as if nothing had been asked for when it was started without the flag."""
    meta = entry["meta_info"]
    return meta["finish_reason"]["type"] != "abort" and meta.get("routed_experts") is None


def _routing(coded: str, tokens: int, shape: RoutedShape) -> np.ndarray:
    """[tokens, layers, per_token] int32 from base64; ValueError for another size or experts that cannot be."""
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
    """From one list of k entries [logprob, token, text] a token; ValueError when there are more or fewer."""
    if len(entries) != tokens or any(len(likeliest) != k for likeliest in entries):
        raise ValueError(f"output_top_logprobs do not hold {k} entries for each of {tokens} tokens")
    # Numbers below 2^53 pass through float64 unharmed; None becomes NaN.
    pairs_RK2 = np.array([[pair[:2] for pair in likeliest] for likeliest in entries], dtype=np.float64).reshape(
        tokens, k, 2
    )
    return TopK(pairs_RK2[..., 1].astype(np.int32), pairs_RK2[..., 0].astype(np.float32))


def _version(name: str) -> int:
    """SGLang calls weights as loaded "default": version 0."""
    return 0 if name == "default" else int(name)


def error_message(response: httpx.Response) -> str:
    try:
        body = response.json()
    except ValueError:
        return response.text[:500]
    if isinstance(body, dict):
        inner = body.get("error")
        return str(body.get("message") or (inner.get("message") if isinstance(inner, dict) else inner) or body)
    return str(body)
