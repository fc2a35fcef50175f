"""Conversion of /generate requests to engine jobs, and of finished jobs to responses in SGLang's format."""

import secrets
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from megatron_rl.errors import UserError
from megatron_rl.protocol.bodies import GenerateBody, PromptBody, SamplingBody, explain
from megatron_rl.server.decode_batch import Job, Sampling
from megatron_rl.server.engine import Engine
from megatron_rl.server.routed_experts import encode_routing, has_experts

_MAX_ROWS = 1 << 14  # samples of all prompts of one request


def parse_jobs(engine: Engine, body: GenerateBody) -> list[Job]:
    """Return one job for each prompt. Raises UserError naming the first invalid field."""
    prompts = body.input_ids if body.batched else [body.input_ids]
    params = body.sampling_params if isinstance(body.sampling_params, list) else [body.sampling_params] * len(prompts)
    if isinstance(body.rid, list):
        rids = body.rid
    elif body.batched and body.rid is not None:
        rids = [f"{body.rid}-{at}" for at in range(len(prompts))]
    else:
        rids = [body.rid or secrets.token_hex(16) for _ in prompts]
    for name, given in (("sampling_params", params), ("rid", rids)):
        if len(given) != len(prompts):
            raise UserError(f"field '{name}': {len(given)} entries for {len(prompts)} prompts")
    jobs, rows = [], 0
    for at, (prompt, param, rid) in enumerate(zip(prompts, params, rids, strict=True)):
        place = (at,) if body.batched else ()
        tokens = _validated(PromptBody, {"input_ids": prompt}, ("input_ids", *place), drop=1).input_ids
        where = ("sampling_params", *place) if isinstance(body.sampling_params, list) else ("sampling_params",)
        sampling = _validated(SamplingBody, param, where)
        start = body.logprob_start_len if body.return_logprob and body.logprob_start_len >= 0 else None
        chosen = _sampling(sampling, engine.eos_ids)
        rows += sampling.n
        if rows > _MAX_ROWS:
            raise UserError(f"field 'input_ids': more than {_MAX_ROWS} samples in one request: send several")
        jobs.append(
            make_job(engine, tokens, chosen, sampling.n, rid, start, body.top_logprobs_num, body.return_routed_experts)
        )
    return jobs


def make_job(
    engine: Engine,
    prompt: Sequence[int],
    sampling: Sampling,
    n: int = 1,
    rid: str | None = None,
    input_start: int | None = None,
    top_logprobs: int = 0,
    routed: bool = False,
) -> Job:
    """Check a request and return a job for it.

    Args:
        engine: the engine, whose model limits what can be requested.
        prompt: token ids, at least one.
        sampling: how tokens are chosen. Without a seed, a random one is used.
        n: number of samples.
        rid: request id; None: a random one.
        input_start: position of the first prompt token whose log-probability is reported; None: none is reported.
        top_logprobs: number of most likely tokens reported at every output position.
        routed: report the experts chosen for every token.

    Raises:
        UserError: names the field that the model cannot take.
    """
    if not prompt:
        raise UserError("field 'input_ids': the prompt is empty")
    if len(prompt) + sampling.max_new_tokens > engine.context:
        raise UserError(
            f"field 'sampling_params.max_new_tokens': {len(prompt)} prompt tokens + {sampling.max_new_tokens} new "
            f"ones exceed the model's context of {engine.context}"
        )
    for name, tokens in (("input_ids", prompt), ("sampling_params.stop_token_ids", sampling.stop_token_ids)):
        for token in (min(tokens), max(tokens)) if tokens else ():
            if not 0 <= token < engine.vocab_size:
                raise UserError(f"field '{name}': token {token} is outside the vocabulary of {engine.vocab_size}")
    if input_start is not None and not 0 <= input_start < len(prompt):
        raise UserError(f"field 'logprob_start_len': {input_start} is outside the prompt of {len(prompt)} tokens")
    if top_logprobs > engine.vocab_size:
        raise UserError(f"field 'top_logprobs_num': {top_logprobs} is more than the vocabulary of {engine.vocab_size}")
    # A filter may leave fewer tokens with nonzero probability than requested. The others have no value to report.
    if top_logprobs and (sampling.top_p < 1 or sampling.top_k > 0):
        raise UserError(
            "field 'top_logprobs_num' needs the whole distribution: send top_p 1 and top_k -1, or leave it out"
        )
    if routed and not has_experts(engine.config):
        raise UserError(
            f"field 'return_routed_experts': the routers of a '{engine.config.model_type}' model are not known"
        )
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    return Job.make(rid or secrets.token_hex(16), prompt, n, sampling, seed, input_start, top_logprobs, routed)


def _sampling(body: SamplingBody, eos_ids: frozenset[int]) -> Sampling:
    """Return how tokens are chosen. `eos_ids` are the model's end-of-text tokens."""
    stops = frozenset() if body.ignore_eos else eos_ids | frozenset(body.stop_token_ids or ())
    return Sampling(body.temperature, body.top_p, body.top_k, body.max_new_tokens, stops, body.sampling_seed)


def _validated(model: Any, value: Any, where: tuple[str | int, ...], drop: int = 0) -> Any:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        located = [{**one, "loc": (*where, *one["loc"][drop:])} for one in error.errors()]
        raise UserError(explain(located, model)) from error


def response_entries(engine: Engine, job: Job, body: GenerateBody) -> list[dict[str, Any]]:
    """Return the /generate response for a finished job: one entry for each sample, in SGLang's format.

    `output_ids` includes the stop token that matched; `text` does not. A non-finite log-probability is null.

    Args:
        engine: the engine, for its tokenizer.
        job: the finished job.
        body: the request.
    """
    out = []
    for row in job.rows:
        finish = row.finish or {}
        meta: dict[str, Any] = {
            "id": job.rid if job.n == 1 else f"{job.rid}-{row.index}",
            "finish_reason": finish,
            "prompt_tokens": len(job.prompt),
            "completion_tokens": len(row.tokens),
            "cached_tokens": 0,
            "num_retractions": row.retractions,
            "weight_version": job.version,
            "weight_versions": [{"version": v, "start": start, "end": end} for v, start, end in row.spans],
        }
        if body.return_logprob:
            meta["output_token_logprobs"] = _entries(row.logprobs, row.tokens)
            scored = job.prompt[job.input_start or 0 :].tolist() if job.input_logprobs else []
            meta["input_token_logprobs"] = [[lp, t, None] for lp, t in zip(job.input_logprobs, scored, strict=True)]
        if job.top_logprobs:
            likeliest = row.likeliest
            tops = zip(likeliest["logp"].tolist(), likeliest["id"].tolist(), strict=True)
            meta["output_top_logprobs"] = [_entries(logps, ids) for logps, ids in tops]
        if job.routed and row.routing is not None:
            meta["routed_experts"] = encode_routing(row.routing)
        reply: dict[str, Any] = {"output_ids": row.tokens, "meta_info": meta}
        if body.return_prompt_token_ids:
            reply["prompt_token_ids"] = job.prompt
        if engine.tokenizer is not None:
            shown = row.tokens[:-1] if finish.get("type") == "stop" else row.tokens
            reply["text"] = engine.tokenizer.decode(shown, skip_special_tokens=True)
        out.append(reply)
    return out


def _entries(logprobs: Sequence[float], tokens: Sequence[int]) -> list[list[Any]]:
    # x - x is 0 only for finite numbers; JSON has no NaN.
    return [[lp if lp - lp == 0 else None, token, None] for lp, token in zip(logprobs, tokens, strict=True)]
