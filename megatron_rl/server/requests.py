"""Conversion of /generate requests to engine jobs, and of finished jobs to responses in SGLang's format."""

import secrets
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from megatron_rl.errors import UserError
from megatron_rl.protocol.bodies import GenerateBody, PromptBody, SamplingBody, explain
from megatron_rl.server.decode_batch import Job, Sampling
from megatron_rl.server.engine import Engine
from megatron_rl.server.routed_experts import encode_routing


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
    jobs = []
    for at, (prompt, param, rid) in enumerate(zip(prompts, params, rids, strict=True)):
        place = (at,) if body.batched else ()
        tokens = _validated(PromptBody, {"input_ids": prompt}, ("input_ids", *place), drop=1).input_ids
        where = ("sampling_params", *place) if isinstance(body.sampling_params, list) else ("sampling_params",)
        sampling = _validated(SamplingBody, param, where)
        start = body.logprob_start_len if body.return_logprob and body.logprob_start_len >= 0 else None
        chosen = _sampling(sampling, engine.eos_ids)
        jobs.append(
            engine.job(tokens, chosen, sampling.n, rid, start, body.top_logprobs_num, body.return_routed_experts)
        )
    return jobs


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


def response_entries(engine: Engine, job: Job, return_logprob: bool) -> list[dict[str, Any]]:
    """Return the /generate response for a finished job: one entry for each sample, in SGLang's format.

    `output_ids` includes the stop token that matched; `text` does not. A non-finite log-probability is null.

    Args:
        engine: the engine, for its tokenizer.
        job: the finished job.
        return_logprob: include the log-probabilities.
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
        if return_logprob:
            meta["output_token_logprobs"] = _entries(row.logprobs, row.tokens)
            scored = job.prompt[job.input_start or 0 :].tolist() if job.input_logprobs else []
            meta["input_token_logprobs"] = [[lp, t, None] for lp, t in zip(job.input_logprobs, scored, strict=True)]
        if job.top_logprobs:
            likeliest = row.likeliest
            tops = zip(likeliest["logp"].tolist(), likeliest["id"].tolist(), strict=True)
            meta["output_top_logprobs"] = [_entries(logps, ids) for logps, ids in tops]
        if job.routed and row.routing is not None:
            meta["routed_experts"] = encode_routing(row.routing)
        answer: dict[str, Any] = {"output_ids": row.tokens, "meta_info": meta}
        if engine.tokenizer is not None:
            shown = row.tokens[:-1] if finish.get("type") == "stop" else row.tokens
            answer["text"] = engine.tokenizer.decode(shown, skip_special_tokens=True)
        out.append(answer)
    return out


def _entries(logprobs: Sequence[float], tokens: Sequence[int]) -> list[list[Any]]:
    # x - x is 0 only for finite numbers; JSON has no NaN.
    return [[lp if lp - lp == 0 else None, token, None] for lp, token in zip(logprobs, tokens, strict=True)]
