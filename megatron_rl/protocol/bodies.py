"""The bodies of SGLang's HTTP contract that the embedded server takes; whatever it does not know is an error."""

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_rl.errors import UserError
from megatron_rl.server.decode_batch import Job, Sampling
from megatron_rl.server.engine import Engine
from megatron_rl.server.routed_experts import encoded


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SamplingBody(_Body):
    """sampling_params of /generate. top_k -1: off. ignore_eos: end by length alone."""

    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1)
    max_new_tokens: int = Field(128, ge=0)
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    n: int = Field(1, ge=1)
    sampling_seed: int | None = Field(None, ge=0, lt=1 << 64)

    @model_validator(mode="after")
    def _consistent(self) -> "SamplingBody":
        if self.top_k == 0:
            raise ValueError("top_k is -1 (off) or at least 1")
        if self.ignore_eos and self.stop_token_ids:
            raise ValueError("ignore_eos also ignores stop_token_ids: send one of them")
        return self

    def sampling(self, eos_ids: frozenset[int]) -> Sampling:
        stops = frozenset() if self.ignore_eos else eos_ids | frozenset(self.stop_token_ids or ())
        return Sampling(self.temperature, self.top_p, self.top_k, self.max_new_tokens, stops, self.sampling_seed)


class GenerateBody(_Body):
    """One prompt or a list of them; sampling_params and rid may be lists of the same length.

    top_logprobs_num: how many of the likeliest tokens to report at every output position. return_routed_experts: report the
    experts chosen for every token of prompt and output but the last.
    """

    input_ids: list[Any]
    sampling_params: dict[str, Any] | list[dict[str, Any]] = Field(default_factory=dict)
    return_logprob: bool = False
    logprob_start_len: int = Field(-1, ge=-1)
    top_logprobs_num: int = Field(0, ge=0, le=64)
    return_routed_experts: bool = False
    stream: Literal[False] = False
    rid: str | list[str] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "GenerateBody":
        if self.top_logprobs_num and not self.return_logprob:
            raise ValueError("top_logprobs_num needs return_logprob: true")
        if self.top_logprobs_num and self.logprob_start_len >= 0:
            raise ValueError("top_logprobs_num is not supported together with logprob_start_len by the embedded engine")
        return self

    @property
    def batched(self) -> bool:
        return bool(self.input_ids) and isinstance(self.input_ids[0], list)


class _Prompt(_Body):
    input_ids: list[int]


class PauseBody(_Body):
    mode: Literal["abort", "retract", "in_place"] = "abort"


class EmptyBody(_Body):
    pass


class AbortBody(_Body):
    """Exactly one of the two."""

    rid: Annotated[str, Field(min_length=1)] | None = None
    abort_all: bool = False

    @model_validator(mode="after")
    def _one(self) -> "AbortBody":
        if (self.rid is None) == (not self.abort_all):
            raise ValueError("give either rid or abort_all: true")
        return self


class UpdateBody(_Body):
    """weight_version is required: a version must never be guessed. flush_cache: refused while requests hold keys and values;
    SGLang's default is true, and it says 400 when it has changed the weights and could not flush."""

    model_path: str = Field(min_length=1)
    weight_version: str = Field(min_length=1)
    flush_cache: bool = False


class BeginUpdateBody(_Body):
    """selector: SGLang's; a draft model is not served here."""

    selector: Literal["all", "target"] = "all"


class JoinGroupBody(_Body):
    master_address: str = Field(min_length=1)
    master_port: int = Field(ge=1, le=65535)
    rank_offset: int = Field(ge=1)
    world_size: int = Field(ge=2)
    group_name: str = Field("weight_update_group", min_length=1)
    backend: Literal["nccl", "gloo"] = "nccl"


class LeaveGroupBody(_Body):
    group_name: str = Field("weight_update_group", min_length=1)


class _BucketBody(_Body):
    """weight_version: in at least one bucket of an update. flush_cache: refused while requests hold keys and values."""

    flush_cache: bool = True
    weight_version: Annotated[str, Field(min_length=1)] | None = None
    load_format: Literal["flattened_bucket"] | None = None
    abort_all_requests: Literal[False] = False
    selector: Literal["all", "target"] = "all"


class DistributedBody(_BucketBody):
    """One entry of names, dtypes and shapes for each tensor. load_format None: a broadcast for each of them."""

    names: list[str] = Field(min_length=1)
    dtypes: list[str]
    shapes: list[list[Annotated[int, Field(ge=0)]]]
    group_name: str = Field("weight_update_group", min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> "DistributedBody":
        if not len(self.names) == len(self.dtypes) == len(self.shapes):
            raise ValueError(
                f"{len(self.names)} names, {len(self.dtypes)} dtypes and {len(self.shapes)} shapes do not match"
            )
        unknown = [name for name in self.dtypes if not isinstance(getattr(torch, name, None), torch.dtype)]
        if unknown:
            raise ValueError(f"dtype '{unknown[0]}' is unknown")
        return self

    @property
    def torch_dtypes(self) -> list[torch.dtype]:
        return [getattr(torch, name) for name in self.dtypes]


class TensorBody(_BucketBody):
    """One payload of `weights.payload` for each rank of the engine: this one has one."""

    serialized_named_tensors: list[str] = Field(min_length=1, max_length=1)


class MemoryBody(_Body):
    """tags: what to release or resume; None: everything. Keys and values outlive no request here, so only weights count."""

    tags: list[Literal["kv_cache", "weights"]] | None = None

    @property
    def weights(self) -> bool:
        return self.tags is None or "weights" in self.tags


class SaveBody(_Body):
    """Not SGLang's: see `Engine.save_weights`."""

    path: str = Field(min_length=1)


class ChecksumBody(_Body):
    action: Literal["checksum"]


def parse_jobs(engine: Engine, body: GenerateBody) -> list[Job]:
    """One job for each prompt; UserError names the first field that cannot be taken."""
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
        tokens = _validated(_Prompt, {"input_ids": prompt}, ("input_ids", *place), drop=1).input_ids
        where = ("sampling_params", *place) if isinstance(body.sampling_params, list) else ("sampling_params",)
        sampling = _validated(SamplingBody, param, where)
        start = body.logprob_start_len if body.return_logprob and body.logprob_start_len >= 0 else None
        chosen = sampling.sampling(engine.eos_ids)
        jobs.append(
            engine.job(tokens, chosen, sampling.n, rid, start, body.top_logprobs_num, body.return_routed_experts)
        )
    return jobs


def _validated(model: Any, value: Any, where: tuple[str | int, ...], drop: int = 0) -> Any:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        located = [{**one, "loc": (*where, *one["loc"][drop:])} for one in error.errors()]
        raise UserError(explain(located, model)) from error


def explain(errors: Sequence[Any], model: type[BaseModel] | None = None) -> str:
    """What pydantic found wrong, field by field; at most three of them."""
    return "; ".join(_explain_one(error, model) for error in errors[:3])


def _explain_one(error: Any, model: type[BaseModel] | None) -> str:
    field = ".".join(str(part) for part in error["loc"] if part != "body")
    what = str(error.get("ctx", {}).get("error", error["msg"])) if error["type"] == "value_error" else error["msg"]
    if error["type"] == "extra_forbidden":
        known = f"; known: {', '.join(sorted(model.model_fields))}" if model else ""
        what = f"not supported by the embedded engine{known}"
    return f"field '{field}': {what}" if field else what


def answers(engine: Engine, job: Job, return_logprob: bool) -> list[dict[str, Any]]:
    """What /generate says of a finished job: one entry for each sample, in SGLang's shape.

    output_ids include the stop token that matched; `text` does not. A non-finite log-probability is null.
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
            meta["routed_experts"] = encoded(row.routing)
        answer: dict[str, Any] = {"output_ids": row.tokens, "meta_info": meta}
        if engine.tokenizer is not None:
            shown = row.tokens[:-1] if finish.get("type") == "stop" else row.tokens
            answer["text"] = engine.tokenizer.decode(shown, skip_special_tokens=True)
        out.append(answer)
    return out


def _entries(logprobs: Sequence[float], tokens: Sequence[int]) -> list[list[Any]]:
    # x - x is 0 for finite numbers alone; JSON has no NaN.
    return [[lp if lp - lp == 0 else None, token, None] for lp, token in zip(logprobs, tokens, strict=True)]
