"""Weights through a folder that the trainer writes and engines read."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor

from megatron_rl.engines.pool import EnginePool
from megatron_rl.errors import CheckpointError, EngineError, UserError
from megatron_rl.files import try_lock
from megatron_rl.protocol.payload import SHARED_MEMORY
from megatron_rl.weight_sync.expected_digests import ExpectedDigests
from megatron_rl.weight_sync.transports.transport import Stream, Transport, each
from megatron_rl.weights.hf_folder import HFFolder, write_hf_folder

_PREFIX = "megatron_rl-weights-"
_LOCK = "in-use"


class DiskTransport(Transport):
    """Complete model folders, one for each version.

    source: the model the engines started from, whose other files are copied. staging: where versions are written (default:
    a private folder in /dev/shm when that has room, else in the temporary folder; engines on other nodes need one they can
    read). keep: versions kept there, the committed one included. quantization: `quantization_config` of what is sent.
    """

    in_buckets = False

    def __init__(
        self,
        source: HFFolder,
        staging: Path | None = None,
        keep: int = 2,
        quantization: Mapping[str, Any] | None = None,
    ) -> None:
        if keep < 1:
            raise UserError(f"keep is {keep}: the version the engines serve must be kept")
        self._source, self._staging, self._keep, self._quantization = source, staging, keep, quantization
        self._folders: list[Path] = []
        self._private: Path | None = None
        self._lock: FileLock | None = None
        self._written: tuple[Path, int] | None = None

    def prepare(self, stream: Stream, version: int, expected: ExpectedDigests) -> None:
        if self._staging is None:
            self._private = self._staging = _private_folder(self._source.nbytes * (self._keep + 1))
            self._lock = try_lock(self._private / _LOCK)
        folder = self._staging / f"v{version:06d}"
        seen = _tallied(stream, expected)
        try:
            expected.digests |= write_hf_folder(
                folder, seen, self._source, manifest_version=version, quantization=self._quantization
            )
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"weight version {version} cannot be written to {folder} ({error}): "
                "free space there or choose another staging folder"
            ) from error
        self._written = (folder, version)

    def deliver(self, engines: EnginePool, ranks: Mapping[str, int]) -> dict[str, EngineError]:
        assert self._written is not None
        folder, version = self._written
        return each(ranks, lambda url: engines.update_weights_from_disk(url, folder, version))[1]

    def commit(self) -> Path:
        assert self._written is not None
        (folder, _), self._written = self._written, None
        self._folders.append(folder)
        while len(self._folders) > self._keep:
            shutil.rmtree(self._folders.pop(0), ignore_errors=True)
        return folder

    def discard(self, engines: EnginePool, urls: Sequence[str]) -> None:
        if self._written is not None:
            shutil.rmtree(self._written[0], ignore_errors=True)
            self._written = None

    def close(self, engines: EnginePool | None) -> None:
        """Remove the versions written so far. The engines keep serving from memory."""
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
        self._folders.clear()
        if self._private is not None:
            shutil.rmtree(self._private, ignore_errors=True)
        if self._lock is not None:
            self._lock.release()


def _tallied(stream: Stream, expected: ExpectedDigests) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in stream:
        expected.add(name, tensor)
        yield name, tensor


def _private_folder(nbytes: int) -> Path:
    """A new folder for this process; those of processes that were killed are removed first, for they hold memory."""
    for place in (SHARED_MEMORY, Path(tempfile.gettempdir())):
        for folder in place.glob(f"{_PREFIX}*"):
            with suppress(OSError):  # somebody else's, or just being made
                lock = folder / _LOCK
                if lock.is_file() and (held := try_lock(lock)) is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    held.release()
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > nbytes
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=SHARED_MEMORY if roomy else None))
