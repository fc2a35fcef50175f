"""Writing of a checkpoint: each writer process makes the digest of its file from the bytes that it writes.

megatron-core's `FileSystemWriterAsync` forks one process per file. What these processes report travels through memory
without a name. It needs no manager process and no folder in TMPDIR, so nothing stays behind if a process is killed.
"""

import io
import json
import logging
import os
import pickle
import queue
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_rl.errors import CheckpointError, StorageError
from megatron_rl.files import LargeFile, replace_file, sync_folder
from megatron_rl.policy.checkpoint_files import NEEDED, FileList, file_digest
from megatron_rl.policy.core_versions import ASYNC_SAVE
from megatron_rl.policy.parallel import Mesh
from megatron_rl.supervise import block_stops
from megatron_rl.weights.dist_index import METADATA_JSON


class _Reports:
    """What the writer processes of one save report to the process that forked them.

    It is anonymous memory that they share, and a pipe. `put` and `get_nowait` are the methods of a queue that
    megatron-core uses.
    """

    def __init__(self) -> None:
        self._results = io.FileIO(os.memfd_create("checkpoint-results"), "w+")
        # A pipe does not mix short writes of several processes. They share the position in a file, and lose some.
        self._files, self._add = (io.FileIO(end, mode) for end, mode in zip(os.pipe(), "rw", strict=True))
        os.set_blocking(self._files.fileno(), False)

    def put(self, results: Any) -> None:
        """Report megatron-core's results. Called once, in a forked process."""
        with os.fdopen(os.dup(self._results.fileno()), "wb") as file:
            pickle.dump(results, file)

    def get_nowait(self) -> Any:
        """Return the results, after the process that reports them has ended. Raise queue.Empty without any."""
        self._results.seek(0)
        content = self._results.readall()
        if not content:
            raise queue.Empty
        return pickle.loads(content)

    def add_file(self, name: str, size: int, digest: str) -> None:
        """Report a file that is complete. Called in several forked processes."""
        self._add.write(json.dumps([name, size, digest]).encode() + b"\n")

    def add_failure(self, reason: str) -> None:
        """Report why a file is not written. torch then raises another error, which does not name it."""
        self.add_file("", 0, reason)

    def files(self) -> tuple[dict[str, tuple[int, str]], str | None]:
        """Return the bytes and the digest of each reported file, by name, and the first failure."""
        lines = [json.loads(line) for line in (self._files.readall() or b"").splitlines()]
        files = {name: (size, digest) for name, size, digest in lines if name}
        return files, next((reason for name, _, reason in lines if not name), None)

    def close(self) -> None:
        """Release the memory. megatron-core, which holds the reports in a module, gets none for its next save."""
        if filesystem_async._results_queue is self:
            filesystem_async._results_queue = None
        self._results.close()
        self._files.close()
        self._add.close()


class _DigestingFile(io.BufferedWriter):
    """A new file that reports the digest of everything that was written, once it is closed without an error."""

    def __init__(self, reports: _Reports, path: str, mode: str) -> None:
        super().__init__(LargeFile(path, mode.replace("b", "")))
        self._reports, self._path = reports, path
        self._digest, self._size = xxhash.xxh3_128(), 0

    def write(self, content: Any) -> int:
        self._digest.update(content)
        try:
            count = super().write(content)
        except OSError as error:
            self._reports.add_failure(_reason(error)[:200])
            raise
        self._size += count
        return count

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        self._reports.add_file(os.path.basename(self._path), self._size, self._digest.hexdigest())


def _write_digesting(write: Callable[..., None], reports: _Reports, *arguments: Any) -> None:
    """Run megatron-core's `write` with files that report their digests. Called in a forked process.

    megatron-core opens its files with the built-in `open`. A name in its module comes before a built-in name.
    """
    block_stops()
    filesystem_async.logger.setLevel(logging.CRITICAL)  # this process reports its errors
    filesystem_async.open = partial(_DigestingFile, reports)
    write(*arguments)


class _Strategy(TorchDistSaveShardedStrategy):
    """megatron-core's strategy for one save, with the digests of the files, and without its own end of the save.

    In megatron-core's end, a full disk is an error on rank 0 alone, and the other ranks wait for it.
    """

    def __init__(self) -> None:
        super().__init__(METADATA_JSON["sharded_backend"], METADATA_JSON["sharded_backend_version"])
        self.reports = _Reports()
        self.writer: Any = None
        self.metadata: Any = None

    def async_save(self, *arguments: Any, **options: Any) -> AsyncRequest:
        filesystem_async._results_queue = self.reports  # else megatron-core starts a manager process
        return super().async_save(*arguments, **options, **ASYNC_SAVE)

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, *_: Any) -> AsyncRequest:
        self.writer, self.metadata = writer, save_state_dict_ret[1]
        write, preload, arguments = writer.get_save_function_and_args()
        if write is not None:
            write = partial(_write_digesting, write, self.reports)
        return AsyncRequest(write, arguments, [], preload_fn=preload)


def start_save(
    content: dict[str, Any], folder: Path, mesh: Mesh, queue: AsyncCallsQueue, publish: Callable[[], None]
) -> None:
    """Let writer processes save this rank's part of a checkpoint into a new folder. Collective.

    Args:
        content: sharded and common state.
        folder: an empty folder.
        mesh: this rank's position.
        queue: completes the save after the writer processes of every rank have ended. It raises CheckpointError, on
            every rank, if a file cannot be written.
        publish: gives the folder its final name; called on rank 0 when everything is on disk.
    """
    strategy = _Strategy()
    sharded, common = save_preprocess(content)
    # Bytes, because the state changes. Rank 0 writes them at the end of the save, where every rank gets its error.
    buffer = io.BytesIO()
    torch.save(common, buffer)
    request = strategy.async_save(sharded, str(folder))
    # The request refers to the save, so the save must not refer to the request: it holds copies of this rank's tensors,
    # and a cycle would keep them until Python's collector walks all objects.
    request.add_finalize_fn(_Save(folder, mesh, strategy, buffer.getvalue(), publish).complete)
    queue.schedule_async_request(request)


class _Save:
    """A save whose files are being written."""

    def __init__(
        self, folder: Path, mesh: Mesh, strategy: _Strategy, common: bytes, publish: Callable[[], None]
    ) -> None:
        self.folder, self.mesh, self._publish = folder, mesh, publish
        self._strategy, self._common = strategy, common

    def complete(self) -> None:
        """Complete the save after the writer processes of every rank have ended. Collective; see `start_save`."""
        strategy = self._strategy
        results = strategy.writer.retrieve_write_results()
        files, failure = strategy.reports.files()
        if not isinstance(results, list):
            failure, results = failure or _reason(results[0]), []
        gathered = self.mesh.gather((failure, results, files))
        strategy.reports.close()
        strategy.writer.write_buckets = None  # the copies of this rank's tensors

        def finish() -> None:
            for rank, (failure, *_) in enumerate(gathered):
                if failure is not None:
                    raise self._cannot_write(f"rank {rank}: {failure}")
            try:
                self._write_rest([results for _, results, _ in gathered], [files for *_, files in gathered])
                self._publish()
            except OSError as error:
                raise self._cannot_write(_reason(error)) from error

        self.mesh.on_lead(finish)

    def _cannot_write(self, reason: str) -> StorageError:
        return StorageError(
            f"checkpoint {self.folder} cannot be written ({reason}): free space there or choose another run.dir; "
            "--resume goes on from the checkpoint before"
        )

    def _write_rest(self, results: list[Any], reported: list[dict[str, tuple[int, str]]]) -> None:
        """Write what rank 0 alone writes, and last the list of all files.

        Args:
            results: megatron-core's results, by rank.
            reported: bytes and digests of the shards, by rank and name.
        """
        shards = {name: written for of_rank in reported for name, written in of_rank.items()}
        self._strategy.writer.finish(self._strategy.metadata, results)
        replace_file(self.folder / COMMON_STATE_FNAME, self._common)
        replace_file(self.folder / CONFIG_FNAME, json.dumps(METADATA_JSON).encode())
        named = {result.storage_data.relative_path for of_rank in results for result in of_rank}
        if named != shards.keys():
            raise CheckpointError(
                f"megatron-core wrote {sorted(named)} to {self.folder}, but reported {sorted(shards)}"
            )
        sizes, digests = {}, {}
        for name in sorted({*shards, *NEEDED}):
            path = self.folder / name
            sizes[name], digests[name] = shards.get(name) or (path.stat().st_size, file_digest(path, sync=True))
            if path.stat().st_size != sizes[name]:
                raise StorageError(
                    f"{path} has {path.stat().st_size} bytes on disk, but {sizes[name]} were written: check the file "
                    "system"
                )
        sync_folder(self.folder)
        FileList(sizes, digests).write(self.folder)


def _reason(error: BaseException) -> str:
    """Return in one line why files were not written. megatron-core wraps what a writer process raised."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = str(error).strip().split("\n")[0]
    if "results_queue" in said:
        return "the process that writes its files ended without a word, perhaps killed for lack of memory"
    return said or type(error).__name__
