"""Proofs of a conversion: every tensor against the manifest or another checkpoint, and logits against transformers."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rl.convert.hf_parts import as_bytes
from megatron_rl.convert.sources import WeightSource, open_source
from megatron_rl.errors import CheckpointError, UserError
from megatron_rl.files import parse_json
from megatron_rl.weights.hf_folder import MANIFEST, HFFolder
from megatron_rl.weights.name_table import Entry


@dataclass
class Comparison:
    """What a comparison found.

    Attributes:
        compared: number of tensors.
        nbytes: bytes that were read.
        differences: what differs, a line for each tensor.
    """

    compared: int = 0
    nbytes: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.differences


def verify_manifest(path: Path, like: Path | None, jobs: int) -> Comparison:
    """Compare every tensor of a converted checkpoint with the SHA-256 that its manifest states.

    Args:
        path: the checkpoint, with manifest.json.
        like: Hugging Face folder of a Megatron checkpoint's model; None: the manifest's source.
        jobs: tensors that are hashed at a time.

    Raises:
        UserError: there is no manifest of a conversion.
    """
    manifest = read_manifest(path)
    stated: dict[str, dict[str, Any]] = manifest["tensors"]
    casts = [name for name, entry in stated.items() if "cast_to" in entry]
    if casts:
        raise UserError(
            f"{path}: {len(casts)} tensors were cast while they were converted, '{casts[0]}' among them, and the "
            "manifest states the source's bytes: compare with the source, `verify A B`"
        )
    if manifest["plan"].get("to") == "hf":
        folder = HFFolder(path)
        names, found = folder.tensors.keys(), _stored_digests(folder, jobs)
    else:
        source = open_source(path, like or Path(manifest["source"]["path"]))
        names, found = source.tensors.keys(), _digests(source, jobs)
    verdict = Comparison()
    for name in sorted(stated.keys() ^ names):
        verdict.differences.append(f"{name}: only in {'the manifest' if name in stated else path}")
    for name, nbytes, digest in found:
        verdict.compared, verdict.nbytes = verdict.compared + 1, verdict.nbytes + nbytes
        entry = stated.get(name)
        if entry is not None and entry["sha256"] != digest:
            verdict.differences.append(f"{name}: SHA-256 {digest[:12]}, the manifest states {entry['sha256'][:12]}")
    return verdict


def verify_pair(a: Path, b: Path, like: Path | None, jobs: int) -> Comparison:
    """Compare two checkpoints tensor by tensor, under Hugging Face names. Kinds may differ; bytes must not.

    Args:
        a: one checkpoint.
        b: the other.
        like: Hugging Face folder of the model; None: whichever of the two is one.
        jobs: tensors that are hashed at a time.
    """
    first, second = (open_source(path, like or other) for path, other in ((a, b), (b, a)))
    verdict = Comparison()
    for name in sorted(first.tensors.keys() ^ second.tensors.keys()):
        verdict.differences.append(f"{name}: only in {a if name in first.tensors else b}")
    for name in sorted(first.tensors.keys() & second.tensors.keys()):
        mine, other = first.tensors[name], second.tensors[name]
        if (mine.shape, mine.dtype) != (other.shape, other.dtype):
            verdict.differences.append(
                f"{name}: {list(mine.shape)} {mine.dtype} in {a}, {list(other.shape)} {other.dtype} in {b}"
            )
    digests = {name: digest for name, _, digest in _digests(second, jobs)}
    for name, nbytes, digest in _digests(first, jobs):
        verdict.compared, verdict.nbytes = verdict.compared + 1, verdict.nbytes + nbytes
        if digests.get(name, digest) != digest and not any(line.startswith(f"{name}:") for line in verdict.differences):
            verdict.differences.append(f"{name}: values differ")
    return verdict


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a converted checkpoint. Raise UserError without one, CheckpointError if it is damaged."""
    file = next((folder / MANIFEST for folder in (path, path.parent) if (folder / MANIFEST).is_file()), None)
    if file is None:
        raise UserError(f"{path} has no {MANIFEST}: give a second checkpoint to compare it with, `verify A B`")
    try:
        content = parse_json(file.read_bytes())
        if content["format"] != 2 or not isinstance(content["tensors"], dict):
            raise ValueError("it is of another format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not the manifest of a conversion ({error})") from error
    return dict(content)


def _digests(source: WeightSource, jobs: int) -> Iterator[tuple[str, int, str]]:
    """Yield name, bytes and SHA-256 of every tensor. Hashing releases the interpreter's lock."""

    def of(unit: tuple[Entry, ...]) -> list[tuple[str, int, str]]:
        hashes = {name: hashlib.sha256() for name in unit[0].rule.hf}
        for entry in unit:
            for name, tensor in zip(entry.rule.hf, source.read(entry), strict=True):
                hashes[name].update(as_bytes(tensor))
        return [(name, source.tensors[name].nbytes, found.hexdigest()) for name, found in hashes.items()]

    todo = source.units()
    with ThreadPoolExecutor(jobs) as pool:
        for start in range(0, len(todo), 2 * jobs):  # not all at once: each holds its tensors
            for found in pool.map(of, todo[start : start + 2 * jobs]):
                yield from found


def _stored_digests(folder: HFFolder, jobs: int) -> Iterator[tuple[str, int, str]]:
    """Yield name, bytes and SHA-256 of every stored tensor, whatever it means."""

    def of(name: str) -> tuple[str, int, str]:
        content = as_bytes(folder.read(name))
        return name, len(content), hashlib.sha256(content).hexdigest()

    names = list(folder.tensors)
    with ThreadPoolExecutor(jobs) as pool:
        for start in range(0, len(names), 2 * jobs):
            yield from pool.map(of, names[start : start + 2 * jobs])
