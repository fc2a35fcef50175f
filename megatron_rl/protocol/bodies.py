"""Request bodies of SGLang's HTTP contract, as the embedded server accepts them. An unknown field is an error."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

# What one request may ask for. A larger one would hold up all others.
MAX_SAMPLES = 4096
_MAX_STOPS = 1024
_MAX_TENSORS = 1 << 20
_MAX_DIMS = 16


def _plain(text: str) -> str:
    """Return the text. Raise ValueError if it can be no name of a file, or cannot be sent back."""
    if "\0" in text:
        raise ValueError("it holds a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("it holds half of a character (a lone surrogate)")
    return text


# The length is checked first, so that the other checks are of a short text.
_Name = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_plain)]
_Path = Annotated[str, Field(min_length=1, max_length=4095), AfterValidator(_plain)]
_TensorName = Annotated[str, Field(min_length=1, max_length=1024)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SamplingBody(_Body):
    """`sampling_params` of /generate.

    Attributes:
        temperature: 0 for the most likely token.
        top_p: probability mass of the tokens that may be sampled; 1: off.
        top_k: number of tokens that may be sampled; -1: off.
        max_new_tokens: maximum number of output tokens.
        stop_token_ids: tokens that also end the output.
        ignore_eos: only the length ends the output.
        n: number of samples.
        sampling_seed: seed of the request.
    """

    temperature: float = Field(1.0, ge=0, le=1e6, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int = Field(-1, ge=-1, lt=1 << 31)
    max_new_tokens: int = Field(128, ge=0, lt=1 << 31)
    stop_token_ids: Annotated[list[int], Field(max_length=_MAX_STOPS)] | None = None
    ignore_eos: bool = False
    n: int = Field(1, ge=1, le=MAX_SAMPLES)
    sampling_seed: int | None = Field(None, ge=0, lt=1 << 64)

    @model_validator(mode="after")
    def _consistent(self) -> "SamplingBody":
        if self.top_k == 0:
            raise ValueError("top_k is -1 (off) or at least 1")
        if self.ignore_eos and self.stop_token_ids:
            raise ValueError("ignore_eos also ignores stop_token_ids: send one of them")
        return self


class GenerateBody(_Body):
    """Body of /generate: one prompt or a list of prompts.

    Attributes:
        input_ids: token ids, or a list of them.
        sampling_params: see `SamplingBody`; for several prompts also a list of the same length.
        return_logprob: report log-probabilities.
        logprob_start_len: first prompt position whose log-probability is reported; -1: none.
        top_logprobs_num: number of most likely tokens to report at every output position.
        return_routed_experts: report the experts chosen for every token of prompt and output except the last.
        return_prompt_token_ids: repeat the prompt's tokens with every sample.
        stream: not supported.
        rid: request id; for several prompts also a list of the same length.
    """

    input_ids: list[Any]
    sampling_params: dict[str, Any] | list[dict[str, Any]] = Field(default_factory=dict)
    return_logprob: bool = False
    logprob_start_len: int = Field(-1, ge=-1, lt=1 << 31)
    top_logprobs_num: int = Field(0, ge=0, le=64)
    return_routed_experts: bool = False
    return_prompt_token_ids: bool = False
    stream: Literal[False] = False
    rid: _Name | list[_Name] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "GenerateBody":
        if self.top_logprobs_num and not self.return_logprob:
            raise ValueError("top_logprobs_num needs return_logprob: true")
        if self.top_logprobs_num and self.logprob_start_len >= 0:
            raise ValueError("top_logprobs_num is not supported together with logprob_start_len by the embedded engine")
        return self

    @property
    def batched(self) -> bool:
        """Whether the body holds a list of prompts."""
        return bool(self.input_ids) and isinstance(self.input_ids[0], list)


class PromptBody(_Body):
    """The token ids of one prompt."""

    input_ids: list[int]


class PauseBody(_Body):
    """Body of /pause_generation; see `Engine.pause` for the modes."""

    mode: Literal["abort", "retract", "in_place"] = "abort"


class EmptyBody(_Body):
    """Body of a call without fields."""

    pass


class AbortBody(_Body):
    """Body of /abort_request. Exactly one of the two fields must be given."""

    rid: _Name | None = None
    abort_all: bool = False

    @model_validator(mode="after")
    def _one(self) -> "AbortBody":
        if (self.rid is None) == (not self.abort_all):
            raise ValueError("give either rid or abort_all: true")
        return self


class UpdateBody(_Body):
    """Body of /update_weights_from_disk.

    Attributes:
        model_path: folder of the weights.
        weight_version: required, because a version must never be guessed.
        flush_cache: also flush the cache; refused while requests hold keys and values. SGLang's default is true; it
            returns 400 if it has changed the weights and could not flush.
    """

    model_path: _Path
    weight_version: _Name
    flush_cache: bool = False


class BeginUpdateBody(_Body):
    """Body of /begin_weight_update. `selector` is SGLang's; the embedded engine has no draft model."""

    selector: Literal["all", "target"] = "all"


class JoinGroupBody(_Body):
    """Body of /init_weights_update_group.

    Attributes:
        master_address: host of the group's store.
        master_port: port of the store.
        rank_offset: rank of the engine's first process in the group.
        world_size: number of processes in the group.
        group_name: name of the group.
        backend: backend of torch.distributed.
    """

    master_address: _Name
    master_port: int = Field(ge=1, le=65535)
    rank_offset: int = Field(ge=1, lt=1 << 16)
    world_size: int = Field(ge=2, le=1 << 16)
    group_name: _Name = "weight_update_group"
    backend: Literal["nccl", "gloo"] = "nccl"

    @model_validator(mode="after")
    def _consistent(self) -> "JoinGroupBody":
        if self.rank_offset >= self.world_size:
            raise ValueError(f"rank_offset {self.rank_offset} is no rank of a group of {self.world_size}")
        return self


class LeaveGroupBody(_Body):
    """Body of /destroy_weights_update_group."""

    group_name: _Name = "weight_update_group"


class _BucketBody(_Body):
    """Common fields of the calls that send a bucket.

    Attributes:
        flush_cache: also flush the cache; refused while requests hold keys and values.
        weight_version: required in at least one bucket of an update.
        load_format: layout of the bucket.
        abort_all_requests: not supported.
        selector: SGLang's; the embedded engine has no draft model.
    """

    flush_cache: bool = True
    weight_version: _Name | None = None
    load_format: Literal["flattened_bucket"] | None = None
    abort_all_requests: Literal[False] = False
    selector: Literal["all", "target"] = "all"


class DistributedBody(_BucketBody):
    """Body of /update_weights_from_distributed.

    Without `load_format`, each tensor has its own broadcast.

    Attributes:
        names: names of the tensors.
        dtypes: one for each tensor.
        shapes: one for each tensor.
        group_name: the group of the broadcast.
    """

    names: list[_TensorName] = Field(min_length=1, max_length=_MAX_TENSORS)
    dtypes: list[Annotated[str, Field(max_length=32)]] = Field(max_length=_MAX_TENSORS)
    shapes: list[Annotated[list[Annotated[int, Field(ge=0, lt=1 << 40)]], Field(max_length=_MAX_DIMS)]] = Field(
        max_length=_MAX_TENSORS
    )
    group_name: _Name = "weight_update_group"

    @model_validator(mode="after")
    def _consistent(self) -> "DistributedBody":
        if not len(self.names) == len(self.dtypes) == len(self.shapes):
            raise ValueError(
                f"{len(self.names)} names, {len(self.dtypes)} dtypes and {len(self.shapes)} shapes do not match"
            )
        unknown = [name for name in set(self.dtypes) if not isinstance(getattr(torch, name, None), torch.dtype)]
        if unknown:
            raise ValueError(f"dtype '{unknown[0]}' is unknown")
        return self

    @property
    def torch_dtypes(self) -> list[torch.dtype]:
        """The dtypes of the tensors."""
        return [getattr(torch, name) for name in self.dtypes]


class TensorBody(_BucketBody):
    """Body of /update_weights_from_tensor: one payload of `protocol.payload`, for the only rank of the engine."""

    serialized_named_tensors: list[str] = Field(min_length=1, max_length=1)


class MemoryBody(_Body):
    """Body of /release_memory_occupation and /resume_memory_occupation.

    `tags` names what is released or resumed; None: everything. Only weights have an effect, because the embedded engine
    keeps no keys and values after a request.
    """

    tags: list[Literal["kv_cache", "weights"]] | None = None

    @property
    def weights(self) -> bool:
        """Whether the call applies to the weights."""
        return self.tags is None or "weights" in self.tags


class SaveBody(_Body):
    """Body of /save_weights, which SGLang does not have; see `Engine.save_weights`."""

    path: _Path


class ChecksumBody(_Body):
    """Body of /weights_checker."""

    action: Literal["checksum"]


def explain(errors: Sequence[Any], model: type[BaseModel] | None = None) -> str:
    """Return pydantic's errors as text, field by field; at most three. For an unknown field, list those of `model`."""
    return "; ".join(_explain_one(error, model) for error in errors[:3])


def _explain_one(error: Any, model: type[BaseModel] | None) -> str:
    field = ".".join(str(part) for part in error["loc"] if part != "body")
    what = str(error.get("ctx", {}).get("error", error["msg"])) if error["type"] == "value_error" else error["msg"]
    if error["type"] == "extra_forbidden":
        known = f"; known: {', '.join(sorted(model.model_fields))}" if model else ""
        what = f"not supported by the embedded engine{known}"
    return f"field '{field}': {what}" if field else what
