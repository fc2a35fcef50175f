"""Requests that would harm the embedded server, and what it must respond. Afterwards it serves as before.

`tests/contract/test_engine_requests.py` sends each one over HTTP.
"""

import base64
import pickle
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BadRequest:
    """A request that is refused.

    Attributes:
        name: what is wrong.
        path: path of the call.
        body: JSON data, or the bytes of the body.
        words: what the message says.
        status: the right status.
        source: address of the public report of a user.
    """

    name: str
    path: str
    body: Any
    words: str
    status: int = 400
    source: str = ""


def _generate(name: str, words: str, sampling: dict[str, Any] | None = None, **body: Any) -> BadRequest:
    return BadRequest(name, "/generate", {"input_ids": [1], "sampling_params": sampling or {}, **body}, words)


def _payload(content: bytes) -> dict[str, Any]:
    return {"serialized_named_tensors": [base64.b64encode(content).decode()], "flush_cache": False}


def _sets(module: str, name: str, attribute: str) -> bytes:
    """Return a pickle that sets an attribute of what is looked up, through the slots of a BUILD opcode."""
    looked_up = f"c{module}\n{name}\n".encode()
    return looked_up + b"(N}(V" + attribute.encode() + b"\ncbuiltins\ndict\nut" + pickle.BUILD + b"."


_LONG = "x" * 5000
_BIG = 1 << 63
_JOIN = {"master_address": "127.0.0.1", "master_port": 9, "rank_offset": 1, "world_size": 2}
_BUCKET = {"names": ["a"], "dtypes": ["float32"], "shapes": [[1]], "flush_cache": False}

BAD_REQUESTS = [
    # Numbers without a bound.
    _generate("top_k of 2**63", "sampling_params.top_k", {"top_k": _BIG}),
    _generate("top_k of 2**31", "sampling_params.top_k", {"top_k": 1 << 31}),
    _generate("top_k of -2**63 - 1", "sampling_params.top_k", {"top_k": -_BIG - 1}),
    _generate("n of 4097", "sampling_params.n", {"n": 4097}),
    _generate("n of 100,000", "sampling_params.n", {"n": 100_000, "max_new_tokens": 1}),
    _generate("n of 10**9", "sampling_params.n", {"n": 10**9}),
    _generate("max_new_tokens of 2**63", "sampling_params.max_new_tokens", {"max_new_tokens": _BIG}),
    _generate("a seed of 2**64", "sampling_params.sampling_seed", {"sampling_seed": 1 << 64}),
    _generate("a temperature of 1e300", "sampling_params.temperature", {"temperature": 1e300}),
    _generate("a negative temperature", "sampling_params.temperature", {"temperature": -1e-9}),
    _generate("100,000 stop tokens", "sampling_params.stop_token_ids", {"stop_token_ids": [2] * 100_000}),
    _generate("a stop token of 2**63", "stop_token_ids", {"stop_token_ids": [_BIG]}),
    _generate("logprob_start_len of 2**63", "logprob_start_len", logprob_start_len=_BIG),
    _generate("a token of 2**63", "input_ids", input_ids=[_BIG]),
    _generate("a token of -2**63 - 1", "input_ids", input_ids=[-_BIG - 1]),
    _generate("a prompt of 200,000 tokens", "exceed the model's context", input_ids=[1] * 200_000),
    _generate("20 prompts of 4096 samples", "more than 16384 samples", {"n": 4096}, input_ids=[[1]] * 20),
    _generate("lists in a list in a list", "input_ids", input_ids=[[[1]]]),
    # Texts.
    _generate("a lone surrogate in rid", "rid", rid="\ud800"),
    _generate("NUL in rid", "rid", rid="a\0b"),
    _generate("a rid of 5000 characters", "rid", rid=_LONG),
    _generate("an empty rid", "rid", rid=""),
    _generate("an unknown field named by a lone surrogate", "unicode", **{"\ud800": 1}),
    BadRequest("NUL in a path to write", "/save_weights", {"path": "/tmp/a\0b"}, "NUL"),
    BadRequest("a path of 5000 characters to write", "/save_weights", {"path": "/tmp/" + _LONG}, "path"),
    BadRequest("a name of 300 characters to write", "/save_weights", {"path": "/tmp/" + "x" * 300}, "too long"),
    BadRequest("a device to write to", "/save_weights", {"path": "/dev/null"}, "cannot be written"),
    BadRequest("a surrogate in a path to write", "/save_weights", {"path": "/tmp/\ud800"}, "path"),
    *(
        BadRequest(name, "/update_weights_from_disk", {"model_path": path, "weight_version": "1"}, words)
        for name, path, words in (
            ("NUL in a path to read", "/tmp/a\0b", "NUL"),
            ("a path of 5000 characters to read", "/tmp/" + _LONG, "model_path"),
            ("a name of 300 characters to read", "/tmp/" + "x" * 300, "too long"),
            ("a surrogate in a path to read", "/tmp/\ud800", "model_path"),
            ("a device to read from", "/dev/null", "no folder of weights"),
        )
    ),
    BadRequest("a version of 5000 characters", "/begin_weight_update", {"weight_version": _LONG}, "not supported"),
    BadRequest("a group's rank beyond its size", "/init_weights_update_group", {**_JOIN, "rank_offset": 2}, "no rank"),
    BadRequest("a group of 2**63", "/init_weights_update_group", {**_JOIN, "world_size": _BIG}, "world_size"),
    BadRequest("a port of 80,000", "/init_weights_update_group", {**_JOIN, "master_port": 80_000}, "master_port"),
    *(
        BadRequest(name, "/update_weights_from_distributed", {**_BUCKET, **fields}, words)
        for name, fields, words in (
            ("a bucket without an update", {}, "begin_weight_update"),
            ("a dtype that is a function", {"dtypes": ["save"]}, "dtype"),
            ("a dtype that is private", {"dtypes": ["__dict__"]}, "dtype"),
            ("a shape of 2**80", {"shapes": [[1 << 80]]}, "shapes"),
            ("a negative shape", {"shapes": [[-1]]}, "shapes"),
            ("a shape of 1000 dimensions", {"shapes": [[1] * 1000]}, "shapes"),
        )
    ),
    # Pickles: see also tests/unit/protocol/test_payload.py.
    *(
        BadRequest(
            f"a payload that sets {attribute} of {name}",
            "/update_weights_from_tensor",
            _payload(_sets(module, name, attribute)),
            f"attributes of a {kind} are not set",
        )
        for module, name, attribute, kind in (
            ("torch.storage", "UntypedStorage", "_new_shared_filename_cpu", "type"),
            ("torch.multiprocessing.reductions", "rebuild_tensor", "__code__", "function"),
            ("torch.multiprocessing.reductions", "rebuild_storage_filename", "__defaults__", "function"),
            ("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata", "start_idx", "type"),
            ("torch", "Tensor", "view", "_TensorMeta"),
        )
    ),
    BadRequest(
        "a payload that wants 64 GiB",
        "/update_weights_from_tensor",
        _payload(b"\x96" + (1 << 36).to_bytes(8, "little")),
        "hold no named tensors",
    ),
    BadRequest(
        "a payload that is not base64", "/update_weights_from_tensor", {"serialized_named_tensors": ["\x7f"]}, ""
    ),
    # Bodies.
    BadRequest("half of a JSON text", "/generate", b'{"input_ids": [1', ""),
    BadRequest("100,000 brackets", "/generate", b"[" * 100_000, ""),
    BadRequest("a number of 5000 digits", "/generate", b'{"input_ids": [' + b"9" * 5000 + b"]}", ""),
    BadRequest(
        "Infinity", "/generate", b'{"input_ids": [1], "sampling_params": {"temperature": Infinity}}', "temperature"
    ),
    BadRequest("NaN", "/generate", b'{"input_ids": [1], "sampling_params": {"top_p": NaN}}', "top_p"),
    BadRequest("no UTF-8", "/generate", b'{"rid": "\xff"}', ""),
    BadRequest("a list", "/generate", [1], ""),
    BadRequest("null", "/pause_generation", None, ""),
    BadRequest("more than 64 MiB", "/generate", b" " * ((1 << 26) + 1), "64 MiB", 413),
    BadRequest("an unknown path", "/generatee", {}, "Not Found", 404),
]
