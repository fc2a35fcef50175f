"""Tensors passed between processes of one machine by reference: shared memory on CPU, CUDA IPC on a GPU.

The format is SGLang's for `/update_weights_from_tensor`: a base64 pickle of a flattened bucket, or of
[(name, tensor), ...], in which torch's own reductions put handles in place of the data. Unpickling resolves only these
reductions and plain data types. Only flattened buckets are sent: under CUDA every tensor of a payload would take a
handle, a slot of a counter and events, and would lengthen a chain that lives as long as the buffer.
"""

import atexit
import base64
import io
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
import torch.multiprocessing as torch_mp
from torch import Tensor
from torch.multiprocessing import reductions

from megatron_rl.errors import EngineError
from megatron_rl.protocol.buckets import Bucket, TensorSlot

SHARED_MEMORY = Path("/dev/shm")
_DEVICE_ARGUMENT = 6  # position of the storage's device in the arguments of reductions.rebuild_cuda_tensor
_SPECIAL = {
    ("torch", "Tensor"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.storage", "UntypedStorage"),
    ("torch.storage", "TypedStorage"),
    ("builtins", "tuple"),
    ("builtins", "list"),
    ("builtins", "dict"),
    ("collections", "OrderedDict"),
    ("copyreg", "__newobj__"),
    *(
        ("torch.multiprocessing.reductions", name)
        for name in (
            "rebuild_tensor",
            "rebuild_storage_filename",
            "rebuild_storage_empty",
            "rebuild_typed_storage",
            "rebuild_typed_storage_child",
        )
    ),
}
_FLAT_ENTRY = ("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata")

# Opcodes that no payload needs: they call a class without its constructor, or allocate as much as they say.
_UNUSED = {
    code[0]
    for code in (
        *(pickle.INST, pickle.OBJ, pickle.PERSID, pickle.BINPERSID, pickle.EXT1, pickle.EXT2, pickle.EXT4),
        *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    )
}

# Errors that unpickling may raise for bytes that `pack_payload` did not write.
_MALFORMED = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, RuntimeError, OverflowError, MemoryError),
    pickle.UnpicklingError,
)


class FlatEntry:
    """Stand-in for SGLang's FlattenedTensorMetadata: name, shape, dtype, start_idx, end_idx and numel, in bytes."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int

    @classmethod
    def of(cls, piece: TensorSlot) -> "FlatEntry":
        """Return the entry of one tensor of a bucket."""
        entry = cls()
        entry.name, entry.shape, entry.dtype = piece.name, torch.Size(piece.shape), piece.dtype
        entry.start_idx, entry.end_idx, entry.numel = piece.start, piece.start + piece.nbytes, piece.nbytes
        return entry


_FLAT_FIELDS = {"name": str, "shape": torch.Size, "dtype": torch.dtype, "start_idx": int, "end_idx": int, "numel": int}


def shared_buffer(nbytes: int, device: torch.device) -> Tensor:
    """Return uint8 memory that other processes of this machine can map.

    On CPU, the memory belongs to a helper process of torch, which frees it when every process that mapped it has ended.

    Raises:
        EngineError: if shared memory has no room for the buffer.
    """
    if device.type != "cpu":
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    if free < nbytes:  # a write to memory that is mapped but missing would end this process with a bus error
        raise EngineError(
            f"{SHARED_MEMORY} has {free >> 20} MiB left, a bucket needs {-(-nbytes // 2**20)}: free space there, lower "
            "rollout.bucket_mb, or take another rollout.transport"
        )
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:  # the helper runs as long as an engine that mapped memory, and would keep the pipe of our stderr open
        os.dup2(nowhere, 2)
        storage = torch.UntypedStorage._new_using_filename_cpu(-(-nbytes // 8) * 8)
    except RuntimeError as error:
        raise EngineError(f"no shared memory for a bucket of {nbytes >> 20} MiB: {error}") from error
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
    return torch.empty(0, dtype=torch.uint8).set_(storage)[:nbytes]


def pack_payload(bucket: Bucket) -> str:
    """Return the handle of a bucket in a `shared_buffer`, and its layout. It is valid while the buffer exists."""
    content = {"flattened_tensor": bucket.data, "metadata": [FlatEntry.of(piece) for piece in bucket.pieces]}
    out = io.BytesIO()
    before = torch_mp.get_sharing_strategy()
    torch_mp.set_sharing_strategy("file_system")  # file descriptors would need a server in this process and its key
    try:
        _Pickler(out, protocol=3).dump(content)
    finally:
        torch_mp.set_sharing_strategy(before)
    return base64.b64encode(out.getvalue()).decode("ascii")


def unpack_payload(payload: str) -> list[tuple[str, Tensor]]:
    """Return the tensors, in the sender's memory: copy what you keep.

    Raises:
        EngineError: the bytes are not such a payload.
    """
    try:
        content = _Unpickler(io.BytesIO(base64.b64decode(payload, validate=True))).load()
        if isinstance(content, dict):
            return _unflatten(content["flattened_tensor"], content["metadata"])
        return [_pair(entry) for entry in content]
    except _MALFORMED as error:
        raise EngineError(f"serialized_named_tensors hold no named tensors of this machine ({error})") from error


def _pair(entry: Any) -> tuple[str, Tensor]:
    name, tensor = entry
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise TypeError(f"a pair of {type(name).__name__} and {type(tensor).__name__}")
    return name, tensor


def _unflatten(flat: Tensor, entries: Sequence[FlatEntry]) -> list[tuple[str, Tensor]]:
    return [_pair((e.name, flat[e.start_idx : e.end_idx].view(e.dtype).reshape(e.shape))) for e in entries]


class _Pickler(pickle._Pickler):
    """Pickler of tensors that identifies a GPU by its UUID, as SGLang does, and names SGLang's class of an entry.

    The GPU's number differs between processes that see different GPUs. The C implementation writes only names of
    classes that this process can import.
    """

    write: Callable[[bytes], None]
    memoize: Callable[[Any], None]
    dispatch_table = ForkingPickler(io.BytesIO()).dispatch_table  # with torch's reductions

    def save_global(self, obj: Any, name: str | None = None) -> None:
        """Write the name of a class or function, as of SGLang for an entry."""
        if obj is FlatEntry:
            self.write(pickle.GLOBAL + "{}\n{}\n".format(*_FLAT_ENTRY).encode("ascii"))
            self.memoize(obj)
        else:
            super().save_global(obj, name)  # type: ignore[misc]  # it is not in the stubs

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_cuda:
            return NotImplemented
        rebuild, arguments = reductions.reduce_tensor(value)
        uuid = str(torch.cuda.get_device_properties(arguments[_DEVICE_ARGUMENT]).uuid)
        return rebuild, (*arguments[:_DEVICE_ARGUMENT], uuid, *arguments[_DEVICE_ARGUMENT + 1 :])


class _Unpickler(pickle._Unpickler):
    """Unpickler that makes tensors from handles, and changes nothing else in this process.

    pickle's BUILD sets attributes of any object, also of a class or function that was looked up. Here only FlatEntry
    has attributes to set. The C implementation cannot be restricted in this way.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Any]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code not in _UNUSED
    }

    def load_build(self) -> None:
        """Set the attributes of a FlatEntry. Raise UnpicklingError for another object."""
        state, entry = self.stack.pop(), self.stack[-1]
        if type(entry) is not FlatEntry or type(state) is not dict:
            raise pickle.UnpicklingError(f"attributes of a {type(entry).__name__} are not set by a payload")
        for name, kind in _FLAT_FIELDS.items():
            if not isinstance(state.get(name), kind):
                raise pickle.UnpicklingError(f"{name} is a {type(state[name]).__name__}")
            setattr(entry, name, state[name])

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == _FLAT_ENTRY:
            return FlatEntry
        if (module, name) == ("torch.multiprocessing.reductions", "rebuild_cuda_tensor"):
            return _rebuild_cuda_tensor
        if (module, name) in _SPECIAL or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def _rebuild_cuda_tensor(*arguments: Any) -> Any:
    device = arguments[_DEVICE_ARGUMENT]
    if isinstance(device, str):
        seen = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
        device = seen[device]
    known = [*arguments[:_DEVICE_ARGUMENT], device, *arguments[_DEVICE_ARGUMENT + 1 :]]
    return reductions.rebuild_cuda_tensor(*known)


def _end_manager() -> None:
    """Terminate torch's manager of shared memory, a child process, when this process ends.

    Without this, the manager would run as long as any engine that has mapped some memory. It must not end earlier,
    because torch does not start a second one.
    """
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.name() == "torch_shm_manager":
                child.terminate()


atexit.register(_end_manager)
