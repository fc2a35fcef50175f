"""Request bodies of SGLang's HTTP contract, as the embedded server accepts them: an unknown field is an error."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator


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


class PromptBody(_Body):
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
