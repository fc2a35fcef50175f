"""Files that survive a crash: replaced as a whole, appended durably, locked by one process at a time.

And the JSON in files that may be damaged.
"""

import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout


def parse_json(content: bytes | str) -> Any:
    """Return the value of a JSON text. Raises ValueError for whatever is wrong with it.

    That includes bytes that are no UTF-8, whole numbers with thousands of digits, and nesting that is too deep.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


class LargeFile(io.FileIO):
    """A file for large contents. A write of many megabytes reaches the system in pieces.

    Linux gives one large write large pages, and it clears and searches for them: on ext4 (Linux 6.18) a GB took 1.9 to
    3.4 s of CPU time, and in pieces 0.3 s.
    """

    PIECE = 1 << 18  # bytes

    def write(self, content: Any) -> int:
        """Write all of a bytes-like object and return its size. Raises OSError."""
        if not memoryview(content).nbytes:
            return 0
        view, at = memoryview(content).cast("B"), 0
        while at < len(view):
            at += super().write(view[at : at + self.PIECE])
        return at


def create_large_file(path: Path | str) -> io.BufferedWriter:
    """Create or empty a file for large contents, see `LargeFile`."""
    return io.BufferedWriter(LargeFile(path, "w"))


def replace_file(path: Path, content: bytes | Callable[[IO[bytes]], Any]) -> None:
    """Replace the content of `path` atomically: write a file next to it, sync it to disk, then rename it.

    `content` is the bytes, or a function that writes them to an open file. Raises OSError.
    """
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content)
        _sync(file)
    partial.replace(path)


def append_file(path: Path, content: bytes) -> None:
    """Append bytes to `path` and return when they are on disk. Raises OSError."""
    with path.open("ab") as file:
        file.write(content)
        _sync(file)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Return when the names in a folder are on disk: a synced file can still lose its name. Raises OSError."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that keep names by themselves
            raise
    finally:
        os.close(folder)


def try_lock(path: Path) -> FileLock | None:
    """Lock a file until this process ends or calls `release`. Return None if another process holds the lock.

    Raises OSError if the file cannot be created or the file system has no locks.
    """
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except NotImplementedError as error:  # filelock's error for a file system without locks
        raise OSError(str(error)) from error
    return lock
