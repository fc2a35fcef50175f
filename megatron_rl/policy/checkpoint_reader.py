"""Reading of a checkpoint by megatron-core, with readers through which no file can run code."""

import io
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingException
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, metadata
from torch.distributed.checkpoint._nested_dict import set_element

from megatron_rl.errors import CheckpointError, first_line
from megatron_rl.weights.dist_index import METADATA, METADATA_JSON, Unreadable, read_metadata


@lru_cache(maxsize=1)
def _metadata_of(path: Path, stamp: tuple[int, int]) -> tuple[metadata.Metadata, int]:
    """Return `read_metadata` of a file. megatron-core reads it three times; `stamp` differs for another file."""
    return read_metadata(path)


def _current_metadata(folder: Path) -> tuple[metadata.Metadata, int]:
    try:
        status = (folder / METADATA).stat()
    except OSError as error:
        raise Unreadable(f"{METADATA} cannot be read: {error.strerror}") from error
    return _metadata_of(folder / METADATA, (status.st_mtime_ns, status.st_size))


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


def _reader_of(checkpoint_dir: str | Path, *_: Any, **__: Any) -> _Reader:
    return _Reader(checkpoint_dir)


_install_readers()


def inspect(folder: Path) -> int:
    """Read the parts of a checkpoint that every rank reads for itself. Return the number of entries with old names.

    An error here is found before ranks wait for each other. Raises Unreadable.
    """
    _, old = _current_metadata(folder)
    _try(COMMON_STATE_FNAME, lambda: torch.load(folder / COMMON_STATE_FNAME, map_location="cpu", weights_only=True))
    config = _try(CONFIG_FNAME, lambda: json.loads((folder / CONFIG_FNAME).read_bytes()))
    backends = ("sharded_backend", "common_backend")
    if not isinstance(config, dict) or any(config.get(key) != METADATA_JSON[key] for key in backends):
        raise Unreadable(f"{CONFIG_FNAME} is damaged: it does not name the format torch_dist")
    return old


def _try(name: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except OSError as error:
        raise Unreadable(f"{name} cannot be read: {error.strerror}") from error
    except Exception as error:  # as for `.metadata`
        raise Unreadable(f"{name} is damaged: {first_line(error)}") from error


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
        raise CheckpointError(f"{folder} cannot be loaded into this model and layout: {first_line(cause)}") from cause
    raise Unreadable(f"it cannot be read: {first_line(cause)}") from cause
