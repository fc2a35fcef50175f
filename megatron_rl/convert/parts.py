"""Runs a conversion part by part: in several processes, resumable after a kill, and atomic.

Files are written into `OUT.partial`. A finished file is on disk before its record is appended to `done.jsonl` there.
The folder gets its final name when all parts are finished. A second start with the same plan goes on with the rest.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_rl.convert.progress_bar import Progress
from megatron_rl.errors import CheckpointError, StorageError, UserError
from megatron_rl.files import append_file, replace_file, sync_folder, try_lock

PLAN, DONE, LOCK = "plan.json", "done.jsonl", "lock"
_MARGIN = 1 << 30  # bytes that stay free
PartReport = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One file of the output.

    Attributes:
        file: its name.
        nbytes: its size, about.
        names: the tensors in it.
        write: writes the file to a path and returns its record for the manifest, JSON values only. It calls its second
            argument with the bytes of each tensor that it has written.
    """

    file: str
    nbytes: int
    names: tuple[str, ...]
    write: Callable[[Path, Callable[[int], None]], PartReport]


@dataclass(frozen=True)
class Destination:
    """The folder that a conversion writes.

    Attributes:
        out: its final path.
        plan: what is converted and how, JSON values only. An unfinished conversion with another plan is refused.
    """

    out: Path
    plan: dict[str, Any]

    @property
    def partial(self) -> Path:
        return self.out.with_name(f"{self.out.name}.partial")

    def check(self, sources: Sequence[Path], nbytes: int, *, restart: bool) -> None:
        """Check that the folder can be written. Nothing is created.

        Args:
            sources: folders that are read, which must not contain it or lie in it.
            nbytes: bytes that will be written.
            restart: an unfinished conversion there is removed, not continued.

        Raises:
            UserError: the path is in use, or an unfinished conversion has another plan.
            CheckpointError: the disk has not enough free space.
        """
        out = self.out.resolve()
        for source in (path.resolve() for path in sources):
            if out == source or source in out.parents or out in source.parents:
                raise UserError(f"{self.out} is, contains or lies in {source}, which is read: choose another folder")
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"{self.out} exists: choose another folder or remove it")
        if (self.partial / PLAN).is_file() and not restart and _digest_of(self.partial) != self.digest:
            raise UserError(
                f"{self.partial} holds an unfinished conversion with another plan: give the same source and options, "
                "or --restart to remove it"
            )
        place = next(parent for parent in self.partial.resolve().parents if parent.is_dir())
        done = sum(record["nbytes"] for record in finished(self.partial).values()) if not restart else 0
        needed, free = int((nbytes - done) * 1.02) + _MARGIN, shutil.disk_usage(place).free
        if free < needed:
            raise StorageError(f"{self.out} needs {needed} bytes, and {free} are free on its disk: free space there")

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.plan, sort_keys=True).encode()).hexdigest()

    @contextmanager
    def opened(self, *, restart: bool, share: int) -> Iterator[Path]:
        """Create or continue the partial folder, and hold its lock meanwhile.

        Args:
            restart: remove an unfinished conversion first.
            share: number of this process among those that convert together.
        """
        if restart and share == 0:
            shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True, exist_ok=True)
        lock = try_lock(self.partial / f"{LOCK}.{share}")
        if lock is None:
            raise UserError(f"another process is converting into {self.out}: wait for it")
        try:
            if share == 0:
                replace_file(self.partial / PLAN, json.dumps({"digest": self.digest, "plan": self.plan}).encode())
            yield self.partial
        finally:
            lock.release()

    def publish(self) -> None:
        """Give the finished folder its final name."""
        for file in (*self.partial.glob(f"{LOCK}.*"), *self.partial.glob(f"{DONE}*"), self.partial / PLAN):
            file.unlink(missing_ok=True)
        if self.out.is_dir():
            self.out.rmdir()  # it is empty
        sync_folder(self.partial)
        self.partial.rename(self.out)
        sync_folder(self.out.parent)


def _digest_of(partial: Path) -> str:
    try:
        return str(json.loads((partial / PLAN).read_bytes())["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def finished(partial: Path) -> dict[str, PartReport]:
    """Return the records of the parts whose files are complete, by file name. A torn last line is left out."""
    records: dict[str, PartReport] = {}
    for log in sorted(partial.glob(f"{DONE}*")):
        for line in log.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            file = partial / record["file"]
            if file.is_file() and file.stat().st_size == record["nbytes"]:
                records[record["file"]] = record
    return records


def run_parts(parts: Sequence[Part], partial: Path, jobs: int, progress: Progress, share: tuple[int, int]) -> None:
    """Write every part of this process's share that is not finished, in `jobs` processes.

    Args:
        parts: all parts of the conversion.
        partial: the folder.
        jobs: number of processes; 1: this one.
        progress: shows the bytes that are written.
        share: (number, count) of the processes that convert together, which take parts in turn.

    Raises:
        CheckpointError: a file cannot be read or written, or a process was killed.
    """
    done = finished(partial)
    mine = [part for number, part in enumerate(parts) if number % share[1] == share[0]]
    progress.skip(sum(part.nbytes for part in mine if part.file in done))
    left = [part for part in mine if part.file not in done]
    log = partial / f"{DONE}.{share[0]}"
    if jobs == 1 or len(left) < 2:
        for part in left:
            append_file(log, _line(_write(part, partial, progress.add)))
        return
    # Parts hold open files and readers. Forked processes have them already; nothing is pickled but a number.
    context = multiprocessing.get_context("fork")
    counter = context.Value("q", 0)
    _shared.update(left=left, partial=partial, counter=counter)
    with progress.following(counter), ProcessPoolExecutor(jobs, context, initializer=_begin_worker) as pool:
        waiting: set[Future[PartReport]] = {pool.submit(_write_numbered, number) for number in range(len(left))}
        try:
            while waiting:
                ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ready:
                    append_file(log, _line(future.result()))
        except BrokenProcessPool as error:
            raise CheckpointError(
                f"a process that wrote {partial} was killed, perhaps for lack of memory: run the same command again, "
                "with fewer --jobs"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_shared: dict[str, Any] = {}


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    torch.set_num_threads(1)  # the processes share the cores


def _write_numbered(number: int) -> PartReport:
    counter = _shared["counter"]

    def add(nbytes: int) -> None:
        with counter.get_lock():
            counter.value += nbytes

    return _write(_shared["left"][number], _shared["partial"], add)


def _write(part: Part, partial: Path, add: Callable[[int], None]) -> PartReport:
    final, writing = partial / part.file, partial / f"{part.file}.writing"
    try:
        record = part.write(writing, add)
        with writing.open("rb") as file:
            os.fsync(file.fileno())
        size = writing.stat().st_size
        writing.replace(final)
        sync_folder(partial)
    except OSError as error:
        free = shutil.disk_usage(partial).free
        raise StorageError(f"{final} cannot be written ({error}): {free} bytes are free there") from error
    return {"file": part.file, "nbytes": size, **record}


def _line(record: PartReport) -> bytes:
    return (json.dumps(record) + "\n").encode()
