"""Reading of a checkpoint: no file of it can run code, and what an older version named differently is renamed.

torch reads `.metadata` and the objects inside shards with plain pickle, which runs whatever the author of the file
wants. Here `.metadata` may only name the classes that torch writes into it. Objects are read with `weights_only`.
"""

import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException, maybe_load_config
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, filesystem, metadata, planner
from torch.distributed.checkpoint._nested_dict import set_element

from megatron_rl.errors import CheckpointError

_METADATA = ".metadata"
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
        raise Unreadable(f"{path.name} is damaged: {_first_line(error)}") from error


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


@lru_cache(maxsize=1)
def _metadata_of(path: Path, stamp: tuple[int, int]) -> tuple[metadata.Metadata, int]:
    """Return `read_metadata` of a file. megatron-core reads it three times; `stamp` tells another file apart."""
    return read_metadata(path)


def _current_metadata(folder: Path) -> tuple[metadata.Metadata, int]:
    try:
        status = (folder / _METADATA).stat()
    except OSError as error:
        raise Unreadable(f"{_METADATA} cannot be read: {error.strerror}") from error
    return _metadata_of(folder / _METADATA, (status.st_mtime_ns, status.st_size))


class _Reader(FileSystemReader):
    """torch's reader of checkpoints with `read_metadata` of this module."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        found, _ = _current_metadata(Path(self.path))
        found.storage_meta = replace(found.storage_meta or metadata.StorageMeta(), load_id=self.load_id)
        return found


class _Planner(torch_strategies.MCoreLoadPlanner):
    """megatron-core's planner, which reads objects as plain data."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        found, name = torch.load(value, weights_only=True), read_item.dest_index.fqn
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], found)
        else:
            self.state_dict[name] = found


def _install_readers() -> None:
    """Replace the reader and the planner in megatron-core's module, which offers no other way to choose them."""
    for name, ours in (("_get_filesystem_reader", _reader_of), ("MCoreLoadPlanner", _Planner)):
        assert hasattr(torch_strategies, name), f"megatron-core has no {name} any more"
        setattr(torch_strategies, name, ours)


def _reader_of(checkpoint_dir: str | Path, cache_metadata: bool = False) -> _Reader:
    return _Reader(checkpoint_dir)


_install_readers()


def inspect(folder: Path) -> int:
    """Read the parts of a checkpoint that every rank reads for itself. Return the number of entries with old names.

    An error here is found before ranks wait for each other. Raises Unreadable.
    """
    _, old = _current_metadata(folder)
    _try(COMMON_STATE_FNAME, lambda: torch.load(folder / COMMON_STATE_FNAME, map_location="cpu", weights_only=True))
    config = _try("metadata.json", lambda: maybe_load_config(str(folder)))
    if config is None or (config.sharded_backend, config.common_backend) != ("torch_dist", "torch"):
        raise Unreadable("metadata.json is damaged: it does not name the format torch_dist")
    return old


def _try(name: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except OSError as error:
        raise Unreadable(f"{name} cannot be read: {error.strerror}") from error
    except Exception as error:  # as for `.metadata`
        raise Unreadable(f"{name} is damaged: {_first_line(error)}") from error


def read_content(template: dict[str, Any], folder: Path, *, verified: bool) -> tuple[Any, set[str], set[str]]:
    """Fill a template from a checkpoint. Collective.

    Args:
        template: sharded state with the shapes of this model and layout.
        folder: the folder of the checkpoint.
        verified: whether the files equal their digests, so that an error is not due to damage.

    Returns:
        The filled template, the keys that only the checkpoint has, and those that only the template has.

    Raises:
        CheckpointError: the checkpoint is of another model.
        Unreadable: a file is damaged or cannot be read.
    """
    try:
        return dist_checkpointing.load(template, str(folder), strict=StrictHandling.RETURN_ALL)
    except CheckpointException as error:  # not a subclass of Exception
        cause = next((pair[0] for pair in error.failures.values()), error)
    # Whatever a damaged file of a checkpoint without digests raises.
    except Exception as error:  # noqa: BLE001
        cause = error
    finally:
        _metadata_of.cache_clear()
    # Planning compares names and shapes. Damage in files without digests may look like any other of these errors.
    planning = CheckpointingException | KeyError | ValueError if verified else CheckpointingException | KeyError
    if isinstance(cause, planning) and not isinstance(cause, Unreadable | pickle.UnpicklingError):
        raise CheckpointError(f"{folder} cannot be loaded into this model and layout: {_first_line(cause)}") from cause
    raise Unreadable(f"it cannot be read: {_first_line(cause)}") from cause


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
