"""Finished groups on disk until they are trained on, so that a killed run does not have to sample them again.

There is one append-only file per step, `step_000012.groups`. A record is a header (magic, length, digest) and the
columns as safetensors. Reading of a file stops at the first record that is truncated or damaged.
"""

import hashlib
import json
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from megatron_rl.errors import CheckpointError
from megatron_rl.files import append_file, replace_file
from megatron_rl.sampling.group import Group
from megatron_rl.sampling.trajectory_builder import ToolUse
from megatron_rl.types import Trajectory

_MAGIC = b"MRLG"
_HEADER = struct.Struct("<4sQ16s")
_REASONS = ("stop", "length")
_COLUMN = "column."  # prefix of the sampled columns' names in a record


class GroupJournal:
    """The journal of finished groups, one file per step.

    Args:
        folder: the folder of the files; created when a group is written.
        asked: text that names everything a group depends on except weights. Groups that were written with another text
            are not read.
    """

    def __init__(self, folder: Path, asked: str) -> None:
        self.folder = folder
        self._asked = np.frombuffer(hashlib.blake2b(asked.encode(), digest_size=16).digest(), np.uint8)
        self._queue: list[tuple[Path, bytes, Future[None]]] = []
        self._queue_lock, self._disk_lock = threading.Lock(), threading.Lock()

    def append(self, step: int, group: Group) -> None:
        """Write a group of `step`. Return when the record is on disk. Raise CheckpointError if it cannot be written.

        Any thread may call it. The groups of threads that wait for the disk are written together, with one sync.
        """
        done: Future[None] = Future()
        record = _record(_packed(group, self._asked))
        with self._queue_lock:
            self._queue.append((self._path(step), record, done))
        with self._disk_lock:
            with self._queue_lock:
                queued, self._queue = self._queue, []
            for path in dict.fromkeys(path for path, _, _ in queued):
                self._write(path, [(content, one) for place, content, one in queued if place == path])
        done.result()

    def _write(self, path: Path, records: list[tuple[bytes, Future[None]]]) -> None:
        """Append records to a file, and set the outcome of each."""
        try:
            with _named(path, "written"):
                self.folder.mkdir(parents=True, exist_ok=True)
                append_file(path, b"".join(content for content, _ in records))
        except Exception as error:  # noqa: BLE001 (every thread that waits raises it)
            for _, done in records:
                done.set_exception(error)
        else:
            for _, done in records:
                done.set_result(None)

    def recover(self, usable: Callable[[Group], bool]) -> tuple[dict[int, Group], int]:
        """Return the usable groups by draw, and the number of groups that are not usable.

        A group is not usable if `usable` returns False, if its draw was found before, or if it was sampled with other
        settings. These groups and damaged records are removed from disk.
        """
        found: dict[int, Group] = {}
        dropped = 0
        for path in sorted(self.folder.glob("step_*.groups")):
            with _named(path, "read back"):
                content = path.read_bytes()
            kept = []
            for payload in _payloads(content):
                group = _unpacked(payload, self._asked)
                if group is None or group.number in found or not usable(group):
                    dropped += 1
                    continue
                found[group.number] = group
                kept.append(_record(payload))
            with _named(path, "rewritten"):
                _replace(path, content, b"".join(kept))
        return found, dropped

    def keep(self, steps: Iterable[int]) -> None:
        """Remove the files of all steps that are not in `steps`."""
        kept = {self._path(step) for step in steps}
        for path in self.folder.glob("step_*.groups"):
            if path not in kept:
                with _named(path, "removed"):
                    path.unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.groups"


@contextmanager
def _named(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be {what} ({error}): free space there and see that the folder belongs to this user"
        ) from error


def _replace(path: Path, old: bytes, new: bytes) -> None:
    if new == old:
        return
    if new:
        replace_file(path, new)
    else:
        path.unlink()


def _record(payload: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, len(payload), hashlib.blake2b(payload, digest_size=16).digest()) + payload


def _payloads(content: bytes) -> list[bytes]:
    """Return the payloads of the complete records at the beginning of a file."""
    out, at = [], 0
    while at + _HEADER.size <= len(content):
        magic, size, digest = _HEADER.unpack_from(content, at)
        payload = content[at + _HEADER.size : at + _HEADER.size + size]
        if magic != _MAGIC or len(payload) != size or hashlib.blake2b(payload, digest_size=16).digest() != digest:
            break
        out.append(payload)
        at += _HEADER.size + size
    return out


def _packed(group: Group, asked: np.ndarray) -> bytes:
    rows = group.trajectories
    first = rows[0]
    arrays: dict[str, np.ndarray] = {
        "asked": asked,
        "prompt_id": _bytes(first.prompt_id),
        "prompt": first.prompt_tokens,
        "group": np.array([first.group, group.resumed, group.retractions, group.reward_errors, *group.tool_use]),
        "reward_metrics": _bytes(json.dumps([dict(metrics) for metrics in group.reward_metrics])),
        "ids": np.array([t.id for t in rows]),
        "lengths": np.array([len(t.response_tokens) for t in rows]),
        "reasons": np.array([_REASONS.index(t.finish_reason) for t in rows]),
        "rewards": np.array([t.reward for t in rows], np.float64),
        **{_COLUMN + name: np.concatenate([t.columns[name] for t in rows]) for name in first.columns},
    }
    if first.routing is not None:
        arrays["routing"] = np.concatenate([t.routing for t in rows if t.routing is not None])
    return bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def _unpacked(payload: bytes, asked: np.ndarray) -> Group | None:
    """Return the group, or None if it was sampled with other settings or written by another version of this file."""
    try:
        arrays = load(payload)
        return _group(arrays) if np.array_equal(arrays["asked"], asked) else None
    except (KeyError, ValueError, SafetensorError):
        return None


def _group(arrays: dict[str, np.ndarray]) -> Group:
    lengths, prompt = arrays["lengths"], arrays["prompt"]
    ends = np.cumsum(lengths)
    routed = np.cumsum(lengths + len(prompt) - 1)
    number, resumed, retractions, reward_errors, calls, errors, void = arrays["group"].tolist()
    columns = {name.removeprefix(_COLUMN): array for name, array in arrays.items() if name.startswith(_COLUMN)}
    rows = []
    for i, (end, length) in enumerate(zip(ends.tolist(), lengths.tolist(), strict=True)):
        whole = slice(int(routed[i]) - length - len(prompt) + 1, int(routed[i]))
        rows.append(
            Trajectory(
                id=int(arrays["ids"][i]),
                group=number,
                prompt_id=arrays["prompt_id"].tobytes().decode(),
                prompt_tokens=prompt,
                columns={name: array[end - length : end] for name, array in columns.items()},
                finish_reason=_REASONS[arrays["reasons"][i]],
                reward=float(arrays["rewards"][i]),
                routing=arrays["routing"][whole] if "routing" in arrays else None,
            )
        )
    metrics = tuple(json.loads(arrays["reward_metrics"].tobytes()))
    return Group(rows, resumed, retractions, ToolUse(calls, errors, void), metrics, reward_errors)
