"""The index of a `torch_dist` checkpoint (`.metadata`), read so that it cannot run code.

torch reads it with plain pickle, which runs whatever the author of the file wants. Here it may only name the classes
that torch writes into it. What an older version named differently is renamed.
"""

import io
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from megatron_rl.errors import first_line

METADATA = ".metadata"
# The content of metadata.json. megatron-core 0.16 reads all four fields, 0.19 the first two.
METADATA_JSON = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_CLASSES = {
    (known.__module__, known.__qualname__): known
    for known in (
        torch.Size,
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorProperties,
        metadata.TensorStorageMetadata,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        filesystem._StoragePrefix,
        planner.SavePlan,
        planner.TensorWriteData,
        planner.WriteItem,
        planner.WriteItemType,
    )
}
_PATHS = (("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"))  # the folder that the writer used
_LAYOUT = ("torch.serialization", "_get_layout")
# The norm before the experts of a layer. Local layers called it as the norm before a dense feed-forward network.
_OLD_NORM, _NORM = "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
_DENSE_PRODUCT = "mlp.linear_fc1.weight"


class Unreadable(Exception):
    """A file of a checkpoint cannot be read. The message is the reason in words."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _CLASSES.get((module, name))
        if known is not None:
            return known
        if (module, name) in _PATHS:
            return PurePosixPath
        if (module, name) == _LAYOUT:
            return partial(torch.serialization._get_layout)  # a pickle may set attributes of what it gets
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not allowed there")


def _unpickle(content: bytes) -> Any:
    """Return the object in `content`, made of allowed classes. A pickle can also set attributes of these classes."""
    before = {known: dict(vars(known)) for known in _CLASSES.values()}
    try:
        return _Unpickler(io.BytesIO(content)).load()
    finally:
        changed = [known for known, attributes in before.items() if dict(vars(known)) != attributes]
        for known in changed:
            for name in vars(known).keys() - before[known].keys():
                delattr(known, name)
            for name, value in before[known].items():
                if vars(known)[name] is not value:
                    setattr(known, name, value)
        if changed:
            raise pickle.UnpicklingError(f"it changes {changed[0].__qualname__}")


def read_metadata(path: Path) -> tuple[metadata.Metadata, int]:
    """Read a `.metadata` file. Return its content and the number of entries with an old name, which are renamed.

    Raises Unreadable.
    """
    try:
        found = _unpickle(path.read_bytes())
        _check(found)
        return _renamed(found)
    # A damaged pickle raises nearly anything: UnpicklingError, EOFError, ValueError, AttributeError, MemoryError.
    except Exception as error:
        raise Unreadable(f"{path.name} is damaged: {first_line(error)}") from error


def _check(found: Any) -> None:
    """Raise ValueError if a part of the index has not the type that its readers take for granted."""
    kinds = metadata.TensorStorageMetadata | metadata.BytesStorageMetadata
    if not isinstance(found, metadata.Metadata):
        raise ValueError("it holds no index")
    for part, key_type, value_type in (
        (found.state_dict_metadata, str, kinds),
        (found.storage_data, metadata.MetadataIndex, filesystem._StorageInfo),
    ):
        if not isinstance(part, dict) or not all(
            isinstance(key, key_type) and isinstance(value, value_type) for key, value in part.items()
        ):
            raise ValueError("its index is malformed")
    for place in found.storage_data.values():
        if not isinstance(place.relative_path, str) or Path(place.relative_path).name != place.relative_path:
            raise ValueError(f"it refers to {place.relative_path!r}, which is no file of this folder")


def _renamed(found: metadata.Metadata) -> tuple[metadata.Metadata, int]:
    """Return an index with today's names, and the number of entries that had an old one.

    A dense layer has the old name too, and beside it the product that the norm belongs to.
    """
    names = found.state_dict_metadata
    new = {
        name: name.removesuffix(_OLD_NORM) + _NORM
        for name in names
        if name.endswith(_OLD_NORM) and name.removesuffix(_OLD_NORM) + _DENSE_PRODUCT not in names
    }
    if new:
        found.state_dict_metadata = {new.get(name, name): entry for name, entry in names.items()}
        found.storage_data = {
            replace(index, fqn=new.get(index.fqn, index.fqn)): place for index, place in found.storage_data.items()
        }
    return found, len(new)
