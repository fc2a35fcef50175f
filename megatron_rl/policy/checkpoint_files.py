"""The files of a checkpoint: their list with sizes and digests, by which damage is found before anything is loaded.

The digests are XXH3-128. They protect against accidents: a flipped bit, a block of zeros, a cut file. SHA-256 would
not protect against an attacker either, who can write the list as well, and is three times slower. This module imports
quickly, for tools that only inspect.
"""

import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from megatron_rl.files import parse_json, replace_file, sync_folder

COMPLETE = "complete.json"
PARTIAL = ".partial"  # suffix of a checkpoint that is not complete yet
DIGESTS = "xxh3_128"
NEEDED = (".metadata", "common.pt", "metadata.json")  # besides the shards
_BLOCK = 8 << 20  # bytes
_READERS = 4  # of one rank: a parallel file system gives one reader only a part of its bandwidth


@dataclass(frozen=True)
class FileList:
    """What `complete.json` says about the files of a checkpoint.

    Attributes:
        sizes: bytes, by name.
        digests: XXH3-128 as hex digits, by name. None in checkpoints that an older version wrote.
    """

    sizes: dict[str, int]
    digests: dict[str, str] | None

    def write(self, folder: Path) -> None:
        """Write the list into a folder whose files are on disk. It marks the checkpoint as complete."""
        content = {"files": self.sizes, DIGESTS: self.digests}
        replace_file(folder / COMPLETE, json.dumps(content, indent=1).encode())
        sync_folder(folder)


@dataclass(frozen=True)
class Check:
    """What one rank found when it compared files with their digests.

    Attributes:
        damage: (name, reason) of the files that differ.
        nbytes: number of bytes that were read.
        seconds: time that this took.
    """

    damage: list[tuple[str, str]]
    nbytes: int
    seconds: float


def find_defect(folder: Path) -> str | None:
    """Return None for a checkpoint whose files are all there in their sizes, else the reason in words.

    No file except the list is read, so damage that changes no size is not found: see `check_digests`.
    """
    try:
        listed = read_list(folder)
    except OSError as error:
        return f"half-written: no {COMPLETE}" if isinstance(error, FileNotFoundError) else _unreadable(COMPLETE, error)
    except ValueError as error:
        return str(error)
    found = (_find_other_size(folder / name, name, size) for name, size in listed.sizes.items())
    return next((reason for reason in found if reason is not None), None)


def _find_other_size(path: Path, name: str, size: int) -> str | None:
    try:
        if not path.is_file():
            return f"{name} is missing"
        there = path.stat().st_size
    except OSError as error:
        return _unreadable(name, error)
    return None if there == size else f"{name} has {there} bytes instead of {size}"


def read_list(folder: Path) -> FileList:
    """Return the list of a checkpoint's files.

    Raises ValueError with the reason if the list is damaged, and OSError if it cannot be read.
    """
    try:
        content = parse_json((folder / COMPLETE).read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.keys() not in ({"files"}, {"files", DIGESTS}):
        raise ValueError(f"{COMPLETE} is damaged")
    sizes, digests = content["files"], content.get(DIGESTS)
    whole = isinstance(sizes, dict) and all(map(_is_inside, sizes)) and all(map(_is_size, sizes.values()))
    if not whole or (DIGESTS in content and not _fits(digests, sizes)):
        raise ValueError(f"{COMPLETE} is damaged")
    for name in NEEDED:
        if name not in sizes:
            raise ValueError(f"{COMPLETE} is damaged: it does not list {name}")
    return FileList(sizes, digests)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and "\0" not in name and not path.is_absolute() and ".." not in path.parts


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _fits(digests: Any, sizes: dict[str, int]) -> bool:
    """Return whether `digests` has one text for each file."""
    return (
        isinstance(digests, dict)
        and digests.keys() == sizes.keys()
        and all(isinstance(digest, str) for digest in digests.values())
    )


def check_digests(folder: Path, listed: FileList, names: Iterable[str]) -> Check:
    """Read files of a checkpoint and compare them with their digests.

    Args:
        folder: the folder of the checkpoint.
        listed: its list of files, with digests.
        names: the files to read.
    """
    assert listed.digests is not None
    began, names = time.perf_counter(), list(names)
    with ThreadPoolExecutor(_READERS) as readers:
        found = readers.map(lambda name: _find_difference(folder / name, listed.digests[name]), names)  # type: ignore[index]
        damage = [(name, reason) for name, reason in zip(names, found, strict=True) if reason is not None]
    return Check(damage, sum(listed.sizes[name] for name in names), time.perf_counter() - began)


def _find_difference(path: Path, digest: str) -> str | None:
    try:
        return None if file_digest(path) == digest else f"{path.name} is damaged: its content has changed"
    except OSError as error:
        return _unreadable(path.name, error)


def _unreadable(name: str, error: OSError) -> str:
    return f"{name} cannot be read: {error.strerror}"


def file_digest(path: Path, *, sync: bool = False) -> str:
    """Return the XXH3-128 of a file as hex digits. With `sync`, also wait until the file is on disk.

    Raises OSError.
    """
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(min(_BLOCK, path.stat().st_size + 1)))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def shares(sizes: dict[str, int], count: int) -> list[list[str]]:
    """Divide files among `count` readers, so that each reads about as many bytes."""
    parts: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        parts[least].append(name)
        loads[least] += sizes[name]
    return parts
