"""Transport through a folder that the trainer writes and the engines read."""

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
from megatron_rl.errors import EngineError, StorageError, UserError
from megatron_rl.files import try_lock
from megatron_rl.protocol.payload import SHARED_MEMORY
from megatron_rl.weight_sync.expected_digests import ExpectedDigests
from megatron_rl.weight_sync.transports.transport import Stream, Transport, each
from megatron_rl.weights.hf_folder import ModelFiles
from megatron_rl.weights.write_folder import write_hf_folder

_PREFIX = "megatron_rl-weights-"
_LOCK = "in-use"


class DiskTransport(Transport):
    """Transport that writes a complete model folder for each version."""

    in_buckets = False

    def __init__(
        self,
        source: ModelFiles,
        staging: Path | None = None,
        keep: int = 2,
        quantization: Mapping[str, Any] | None = None,
    ) -> None:
        """Set the folders; nothing is written yet.

        Args:
            source: the model that the engines started from; its other files are copied.
            staging: folder for the versions. Engines on other nodes must be able to read it. None: a private folder in
                /dev/shm if it has enough free space, else in the temporary folder.
            keep: number of versions kept there, including the committed one.
            quantization: `quantization_config` of the weights that are sent.

        Raises:
            UserError: if `keep` is below 1.
        """
        if keep < 1:
            raise UserError(f"keep is {keep}: the version the engines serve must be kept")
        self._source, self._staging, self._keep, self._quantization = source, staging, keep, quantization
        self._folders: list[Path] = []
        self._private: Path | None = None
        self._lock: FileLock | None = None
        self._written: tuple[Path, int] | None = None

    def prepare(self, stream: Stream, version: int, expected: ExpectedDigests) -> None:
        """Write the folder of a version while the engines still generate.

        Args:
            stream: names and tensors of the version.
            version: the version number.
            expected: gets the digests of the version.

        Raises:
            StorageError: if the folder cannot be written.
        """
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
            raise StorageError(
                f"weight version {version} cannot be written to {folder} ({error}): "
                "free space there or choose another staging folder"
            ) from error
        self._written = (folder, version)

    def deliver(self, engines: EnginePool, ranks: Mapping[str, int]) -> dict[str, EngineError]:
        """Let paused engines load the folder. Return the errors, by engine."""
        assert self._written is not None
        folder, version = self._written
        return each(ranks, lambda url: engines.update_weights_from_disk(url, folder, version))[1]

    def commit(self) -> Path:
        """Keep the folder of the confirmed version, remove those older than the last `keep`, and return it."""
        assert self._written is not None
        (folder, _), self._written = self._written, None
        self._folders.append(folder)
        while len(self._folders) > self._keep:
            shutil.rmtree(self._folders.pop(0), ignore_errors=True)
        return folder

    def discard(self, engines: EnginePool, urls: Sequence[str]) -> None:
        """Remove the folder of the failed version."""
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
        expected.add({name: tensor})
        yield name, tensor


def _private_folder(nbytes: int) -> Path:
    """Create and return a folder for this process. First remove folders of killed processes, which still use memory."""
    for place in (SHARED_MEMORY, Path(tempfile.gettempdir())):
        for folder in place.glob(f"{_PREFIX}*"):
            with suppress(OSError):  # the folder of another user, or one that is being created
                lock = folder / _LOCK
                if lock.is_file() and (held := try_lock(lock)) is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    held.release()
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > nbytes
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=SHARED_MEMORY if roomy else None))
