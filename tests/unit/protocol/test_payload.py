"""A payload can name tensors of this machine and nothing else. A payload that names missing memory is refused."""

import base64
import os
import pickle
import pickletools
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from megatron_rl.errors import EngineError
from megatron_rl.protocol.buckets import Bucket, TensorSlot
from megatron_rl.protocol.payload import SHARED_MEMORY, pack_payload, shared_buffer, unpack_payload

Wrap = Callable[[Any], Any]
Usage = namedtuple("Usage", "total used free")


class Call:
    """An object whose pickle calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def test_a_payload_holds_the_tensors_that_were_packed() -> None:
    buffer = shared_buffer(64, torch.device("cpu"))
    buffer.copy_(torch.arange(64, dtype=torch.uint8))
    pieces = TensorSlot("codes", torch.float8_e4m3fn, (4, 8), 0), TensorSlot("scales", torch.float32, (8,), 32)
    found = unpack_payload(pack_payload(Bucket(0, pieces, buffer, last=True)))
    assert [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found] == [
        (piece.name, piece.dtype, piece.shape) for piece in pieces
    ]
    assert torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in found]).equal(buffer)


@pytest.mark.parametrize("protocol", [0, 4])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda call: call,
        lambda call: [("weight", call)],
        lambda call: {"flattened_tensor": call, "metadata": []},
        lambda call: {"flattened_tensor": None, "metadata": [call]},
    ],
    ids=["alone", "as a tensor", "as the flat tensor", "as metadata"],
)
@pytest.mark.parametrize(
    ("function", "text"), [(os.system, "touch {}"), (eval, "open({!r}, 'w')")], ids=["os.system", "builtins.eval"]
)
def test_a_payload_that_calls_a_function_is_refused_and_the_function_is_not_called(
    function: Callable[[str], Any], text: str, wrap: Wrap, protocol: int, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    harmful = pickle.dumps(wrap(Call(function, text.format(str(mark)))), protocol)
    with pytest.raises(
        EngineError, match=rf"hold no named tensors of this machine \(\w+\.{function.__name__} is not allowed"
    ):
        unpack_payload(encoded(harmful))
    assert not mark.exists()
    pickle.loads(harmful)
    assert mark.exists()  # an unrestricted unpickler does call the function


@pytest.mark.parametrize(
    "name",
    [
        "torch save",  # in the same module as the dtypes, which are allowed
        "torch float32.__class__",
        "torch serialization.os.system",
        "torch.storage _load_from_bytes",  # unpickles anything
        "torch.multiprocessing.reductions rebuild_storage_fd",
        "torch._utils _rebuild_tensor_v2",
        "builtins getattr",
        "collections namedtuple",
    ],
)
def test_a_payload_that_only_names_what_is_not_allowed_is_refused(name: str) -> None:
    module, attribute = name.split()
    with pytest.raises(EngineError, match=rf"{module}\.{attribute} is not allowed"):
        unpack_payload(encoded(f"c{module}\n{attribute}\n.".encode()))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps(7),
        pickle.dumps([("weight", "no tensor")]),
        pickle.dumps([(1, 2, 3)]),
        pickle.dumps({"flattened_tensor": 1}),
        pickle.dumps({"flattened_tensor": "text", "metadata": [1]}),
        pickle.dumps([("weight", list(range(100)))])[:-60],
        b"\x8d" + b"\xff" * 8 + b".",
    ],
    ids=[
        "empty",
        "text",
        "number",
        "string for a tensor",
        "triple",
        "no metadata",
        "text for a bucket",
        "cut off",
        "too long",
    ],
)
def test_what_holds_no_tensors_is_refused(content: bytes) -> None:
    with pytest.raises(EngineError, match="hold no named tensors of this machine"):
        unpack_payload(encoded(content))
    with pytest.raises(EngineError, match="hold no named tensors of this machine"):
        unpack_payload("no base64!")


@pytest.mark.parametrize(
    ("looked_up", "attribute"),
    [
        (torch.UntypedStorage, "_new_shared_filename_cpu"),
        (torch.Tensor, "view"),
        (torch.nn.Parameter, "data"),
        (reductions.rebuild_tensor, "__code__"),
        (reductions.rebuild_storage_filename, "__defaults__"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_payload_cannot_change_what_it_looks_up(looked_up: Any, attribute: str) -> None:
    before = getattr(looked_up, attribute)
    name = f"c{looked_up.__module__}\n{looked_up.__name__}\n".encode()
    for state in (b"(N}(V%s\ncbuiltins\ndict\nut" % attribute.encode(), b"}(V%s\nNu" % attribute.encode()):
        with pytest.raises(EngineError, match="are not set by a payload"):
            unpack_payload(encoded(name + state + b"b."))
    assert getattr(looked_up, attribute) is before
    shared = shared_buffer(8, torch.device("cpu"))
    bucket = Bucket(0, (TensorSlot("a", torch.uint8, (8,), 0),), shared, last=True)
    assert unpack_payload(pack_payload(bucket))[0][0] == "a"


def test_a_payload_has_one_handle_and_names_sglang_s_own_class() -> None:
    """Each handle under CUDA lengthens a chain that lives as long as the buffer."""
    buffer = shared_buffer(64, torch.device("cpu"))
    pieces = tuple(TensorSlot(f"weight{i}", torch.uint8, (8,), 8 * i) for i in range(8))
    content = base64.b64decode(pack_payload(Bucket(0, pieces, buffer, last=True)))
    called = [name for code, name, _ in pickletools.genops(content) if code.name == "GLOBAL"]
    assert called.count("torch.multiprocessing.reductions rebuild_storage_filename") == 1
    assert called.count("sglang.srt.weight_sync.tensor_bucket FlattenedTensorMetadata") == 1
    assert not any(name.startswith("megatron_rl") for name in called)


def test_a_buffer_that_shared_memory_has_no_room_for_is_refused_before_any_of_it_is_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def nearly_full(path: Path) -> Usage:
        asked.append(path)
        return Usage(64 << 20, (64 << 20) - 1000, 1000)

    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    assert shared_buffer(1000, torch.device("cpu")).numel() == 1000
    ours = f"torch_{os.getpid()}_*"
    before = set(SHARED_MEMORY.glob(ours))
    with pytest.raises(EngineError, match=r"/dev/shm has 0 MiB left, a bucket needs 3.*lower rollout\.bucket_mb"):
        shared_buffer((2 << 20) + 1, torch.device("cpu"))
    with pytest.raises(EngineError, match="has 0 MiB left"):
        shared_buffer(1001, torch.device("cpu"))
    assert set(SHARED_MEMORY.glob(ours)) <= before and set(asked) == {SHARED_MEMORY}
