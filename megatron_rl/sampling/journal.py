"""Finished groups on disk until they are trained on, so that a killed run does not have to sample them again.

There is one append-only file per step, `step_000012.groups`. A record is a header (magic, length, digest) and an npz of
columns. Reading of a file stops at the first record that is truncated or damaged.
"""

import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from megatron_rl.errors import CheckpointError
from megatron_rl.files import append_file, replace_file
from megatron_rl.sampling.group import Group
from megatron_rl.sampling.trajectory_builder import ToolUse
from megatron_rl.types import TopK, Trajectory, VersionSpan

_MAGIC = b"MRLG"
_HEADER = struct.Struct("<4sQ16s")
_REASONS = ("stop", "length")


class GroupJournal:
    """The journal of finished groups, one file per step.

    Args:
        folder: the folder of the files; created when a group is written.
        asked: text that names everything a group depends on except weights. Groups that were written with another text
            are not read.
    """

    def __init__(self, folder: Path, asked: str) -> None:
        self.folder = folder
        self._asked = hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()

    def append(self, step: int, group: Group) -> None:
        """Write a group of `step`. Return when the record is on disk. Raise CheckpointError if it cannot be written."""
        with _named(self._path(step), "written"):
            self.folder.mkdir(parents=True, exist_ok=True)
            append_file(self._path(step), _record(_packed(group, self._asked)))

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


def _packed(group: Group, asked: str) -> bytes:
    rows = group.trajectories
    first = rows[0]
    columns: dict[str, np.ndarray] = {
        "asked": np.array(asked),
        "prompt_id": np.array(first.prompt_id),
        "prompt": np.array(first.prompt_tokens, np.int64),
        "group": np.array([first.group, group.resumed, group.retractions, group.reward_errors, *group.tool_use]),
        "reward_metrics": np.array(json.dumps([dict(metrics) for metrics in group.reward_metrics])),
        "ids": np.array([t.id for t in rows]),
        "lengths": np.array([len(t.response_tokens) for t in rows]),
        "tokens": np.concatenate([np.array(t.response_tokens, np.int64) for t in rows]),
        "reasons": np.array([_REASONS.index(t.finish_reason) for t in rows]),
        "rewards": np.array([t.reward for t in rows], np.float64),
        "span_counts": np.array([len(t.versions) for t in rows]),
        "spans": np.array([span for t in rows for span in t.versions], np.int64).reshape(-1, 3),
        "masked": np.array([t.response_mask is not None for t in rows]),
        "mask": np.concatenate([np.array(t.response_mask or [1] * len(t.response_tokens), np.int8) for t in rows]),
    }
    if first.logmu is not None:
        columns["logmu"] = np.concatenate([np.array(t.logmu, np.float64) for t in rows])
    if first.topk is not None:
        columns["topk_ids"] = np.concatenate([t.topk.ids for t in rows if t.topk is not None])
        columns["topk_logmu"] = np.concatenate([t.topk.logmu for t in rows if t.topk is not None])
    if first.routing is not None:
        columns["routing"] = np.concatenate([t.routing for t in rows if t.routing is not None])
    file = io.BytesIO()
    np.savez(file, **columns)  # type: ignore[arg-type]  # keys are names
    return file.getvalue()


def _unpacked(payload: bytes, asked: str) -> Group | None:
    """Return the group, or None if it was sampled with other settings or written by another version of this file."""
    try:
        with np.load(io.BytesIO(payload), allow_pickle=False) as file:
            c = {name: file[name] for name in file.files}
        if str(c["asked"]) != asked:
            return None
        return _group(c)
    except (KeyError, ValueError, zipfile.BadZipFile):
        return None


def _group(c: dict[str, np.ndarray]) -> Group:
    ends, span_ends = np.cumsum(c["lengths"]), np.cumsum(c["span_counts"])
    prompt = tuple(c["prompt"].tolist())
    routed = np.cumsum(c["lengths"] + len(prompt) - 1)
    number, resumed, retractions, reward_errors, calls, errors, void = c["group"].tolist()
    rows = []
    for i, end in enumerate(ends.tolist()):
        at = slice(end - int(c["lengths"][i]), end)
        spans = c["spans"][span_ends[i] - c["span_counts"][i] : span_ends[i]].tolist()
        whole = slice(int(routed[i] - c["lengths"][i]) - len(prompt) + 1, int(routed[i]))
        rows.append(
            Trajectory(
                id=int(c["ids"][i]),
                group=number,
                prompt_id=str(c["prompt_id"]),
                prompt_tokens=prompt,
                response_tokens=tuple(c["tokens"][at].tolist()),
                logmu=tuple(c["logmu"][at].tolist()) if "logmu" in c else None,
                finish_reason=_REASONS[c["reasons"][i]],
                versions=tuple(VersionSpan(*span) for span in spans),
                reward=float(c["rewards"][i]),
                topk=TopK(c["topk_ids"][at], c["topk_logmu"][at]) if "topk_ids" in c else None,
                response_mask=tuple(c["mask"][at].tolist()) if c["masked"][i] else None,
                routing=c["routing"][whole] if "routing" in c else None,
            )
        )
    metrics = tuple(json.loads(str(c["reward_metrics"])))
    return Group(rows, resumed, retractions, ToolUse(calls, errors, void), metrics, reward_errors)
