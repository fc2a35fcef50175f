"""SGLang's /generate request, its JSON, and the samples that the client makes of the response."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx
import numpy as np
import orjson

from megatron_rl.types import TokenIds


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
    if request.n > 1:  # SGLang gives each of several samples an id of its own, which does not name the request
        body["return_prompt_token_ids"] = True
    return body


def to_json(body: Any) -> bytes:
    """Return JSON. Arrays of numpy are written as lists."""
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


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
