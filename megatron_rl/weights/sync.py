"""Weights from the trainer to the engines through a folder both can read, as one transaction per version."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from megatron_rl.errors import CheckpointError, EngineError, MegatronRLError, UserError
from megatron_rl.weights.hf import HFFolder, write_hf_folder
from megatron_rl.weights.quantised import is_finite
from megatron_rl.weights.transaction import Engines, Version, load_version, update_engines

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "megatron_rl-weights-"


@dataclass(frozen=True, slots=True)
class PushReport:
    """A committed version. nbytes: of its tensors. dropped: engine -> reason, for engines that could not resume."""

    version: int
    nbytes: int
    write_seconds: float
    update_seconds: float
    dropped: dict[str, str]


class DiskSync:
    """Transactional weight updates over the disk transport.

    pool: the engines on global rank 0, None on the other ranks. source: the folder the engines started from; it is
    version 0. staging: where versions are written (default: a private folder in /dev/shm when that has room, else in
    the temporary folder; engines on other nodes need one they can read). keep: versions kept there, the committed
    one included. group: the ranks that learn a push's outcome (default: the world when torch.distributed runs).
    quantization: `quantization_config` of what is pushed, when that is codes and scales.
    """

    def __init__(
        self,
        pool: Engines | None,
        source: HFFolder,
        staging: Path | None = None,
        keep: int = 2,
        group: dist.ProcessGroup | None = None,
        quantization: Mapping[str, Any] | None = None,
    ) -> None:
        if keep < 1:
            raise UserError(f"keep is {keep}: the version the engines serve must be kept")
        self._pool, self._source, self._keep, self._group = pool, source, keep, group
        self._quantization = quantization
        self._committed = Version(0, source.path, None)
        self._folders: list[Path] = []
        self._private: Path | None = None
        if pool is not None and staging is None:
            self._private = staging = _private_folder(source.nbytes * (keep + 1))
        self._staging = staging

    @property
    def version(self) -> int:
        """The version the engines serve (known on global rank 0)."""
        return self._committed.number

    def push(self, tensors: Iterable[tuple[str, Tensor | None]], version: int) -> PushReport:
        """Collective: write what `export_weights` or `WireTensors` yields, have every engine load and confirm it, commit.

        Every rank returns the same report or raises the same error: CheckpointError when the weights are not finite
        or cannot be written (no engine was touched), EngineError naming engine and tensor when one did not confirm;
        then the engines serve the version before, and those that could not be brought back are dropped.
        """
        stream = iter(tensors)
        outcome: list[PushReport | MegatronRLError] = [EngineError("no engine pool on global rank 0: give DiskSync one there")]
        if self._pool is not None:
            try:
                outcome = [self._push(self._pool, stream, version)]
            except MegatronRLError as error:
                outcome = [error]
        for _ in stream:  # the export is collective: after a failure too, every rank runs it to its end
            pass
        if dist.is_initialized():
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if isinstance(outcome[0], MegatronRLError):
            outcome[0].everywhere = True
            raise outcome[0]
        return outcome[0]

    def restore(self, url: str) -> None:
        """On global rank 0: bring one engine, a restarted one say, to the committed version. EngineError if it cannot."""
        if self._pool is None:
            raise UserError("restore is called on a rank without an engine pool: call it on global rank 0")
        load_version(self._pool, url, self._committed, self._committed.digests)

    def close(self) -> None:
        """Remove the versions written so far. The engines keep serving from memory."""
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
        self._folders.clear()
        if self._private is not None:
            shutil.rmtree(self._private, ignore_errors=True)

    def _push(self, pool: Engines, stream: Iterator[tuple[str, Tensor | None]], version: int) -> PushReport:
        if version <= self._committed.number:
            raise UserError(f"weight version {version} does not follow version {self._committed.number}: versions only grow")
        started = time.monotonic()
        staged, nbytes = self._stage(stream, version)
        written = time.monotonic()
        try:
            dropped = update_engines(pool, staged, self._committed)
        except EngineError:
            shutil.rmtree(staged.folder, ignore_errors=True)
            raise
        self._committed = staged
        self._folders.append(staged.folder)
        while len(self._folders) > self._keep:
            shutil.rmtree(self._folders.pop(0), ignore_errors=True)
        return PushReport(version, nbytes, written - started, time.monotonic() - written, dropped)

    def _stage(self, stream: Iterator[tuple[str, Tensor | None]], version: int) -> tuple[Version, int]:
        assert self._staging is not None
        folder = self._staging / f"v{version:06d}"
        sent = _Counted(stream)
        try:
            digests = write_hf_folder(folder, sent, self._source, manifest_version=version, quantization=self._quantization)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"weight version {version} cannot be written to {folder} ({error}): "
                "free space there or choose another staging folder"
            ) from error
        return Version(version, folder, digests), sent.nbytes


class _Counted:
    """The stream as rank 0 needs it: every tensor present and finite; its bytes counted."""

    def __init__(self, stream: Iterator[tuple[str, Tensor | None]]) -> None:
        self._stream = stream
        self.nbytes = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._stream:
            if tensor is None:
                raise UserError(f"tensor '{name}' of a push is None on the rank with the engines: that must be global rank 0")
            if not is_finite(tensor):
                raise CheckpointError(
                    f"tensor '{name}' holds values that are not finite: the engines keep the weights they have"
                )
            self.nbytes += tensor.nbytes
            yield name, tensor


def _private_folder(nbytes: int) -> Path:
    """A folder named after this process; those of processes that were killed are removed first, for they hold memory."""
    for place in (_SHARED_MEMORY, Path(tempfile.gettempdir())):
        for folder in place.glob(f"{_PREFIX}*-*"):
            owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
            if owner.isdigit() and not psutil.pid_exists(int(owner)):
                shutil.rmtree(folder, ignore_errors=True)
    roomy = _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > nbytes
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_SHARED_MEMORY if roomy else None))
