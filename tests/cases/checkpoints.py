"""What may happen to the files of a checkpoint, and what `--resume` has to do with it.

Each case damages the newest of two checkpoints. Unless it is `used`, the older one is loaded, and `says` is printed.
"""

import io
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_rl.policy.checkpoint_files import COMPLETE, FileList, file_digest


@dataclass(frozen=True)
class Case:
    """One kind of damage.

    Attributes:
        damage: damages the file or, for "", the folder of the checkpoint.
        says: pattern of what is printed; {file} stands for the file's name.
        on: name of the damaged file; "*": each file in its turn; "": the folder.
        used: the checkpoint is loaded all the same.
        experts_only: makes sense for a mixture of experts alone.
    """

    damage: Callable[[Path], None]
    says: str
    on: str = "*"
    used: bool = False
    experts_only: bool = False

    def files(self, folder: Path) -> list[str]:
        """Return the names of the files to damage in their turn."""
        return sorted(path.name for path in folder.iterdir()) if self.on == "*" else [self.on]


def one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 10] ^= 0x01
    file.write_bytes(content)


def zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def gone(file: Path) -> None:
    file.unlink()


def grown(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def unreadable(file: Path) -> None:
    file.unlink()
    file.mkdir()


def nothing(folder: Path) -> None:
    pass


def written(content: bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(content) and None


def edited(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change the list of files as JSON."""

    def change(file: Path) -> None:
        content = json.loads(file.read_bytes())
        edit(content)
        file.write_text(json.dumps(content))

    return change


def listed_again(folder: Path) -> None:
    """Write a list that fits the files, as the author of a prepared checkpoint would."""
    files = sorted(path for path in folder.iterdir() if path.name != COMPLETE)
    FileList({f.name: f.stat().st_size for f in files}, {f.name: file_digest(f) for f in files}).write(folder)


def without_digests(damage: Callable[[Path], None], pattern: str = "") -> Callable[[Path], None]:
    """Damage the files of that pattern, then write a list as older versions did."""

    def change(folder: Path) -> None:
        for file in sorted(folder.glob(pattern)) if pattern else []:
            damage(file)
        listed_again(folder)
        edited(lambda content: content.pop("xxh3_128"))(folder / COMPLETE)

    return change


class Runs:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def index_runs_code(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Runs(folder / "executed")))
    listed_again(folder)


def common_runs_code(folder: Path) -> None:
    torch.save(Runs(folder / "executed"), folder / "common.pt")
    listed_again(folder)


def shard_runs_code(folder: Path) -> None:
    """Let the index refer to an object that runs code where the random state was."""
    buffer, index = io.BytesIO(), pickle.loads((folder / ".metadata").read_bytes())
    torch.save(Runs(folder / "executed"), buffer)
    for key, place in index.storage_data.items():
        if key.fqn.startswith("rng_of_"):
            shard = folder / place.relative_path
            index.storage_data[key] = replace(place, offset=shard.stat().st_size, length=buffer.tell())
            shard.write_bytes(shard.read_bytes() + buffer.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    listed_again(folder)


def index_leaves_the_folder(folder: Path) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    key, place = next(iter(index.storage_data.items()))
    index.storage_data[key] = replace(place, relative_path=f"../step_000001/{place.relative_path}")
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    listed_again(folder)


def old_norm_names(folder: Path) -> None:
    """Name the norm before the experts as versions did that used the map of dense layers."""

    def old(name: str) -> str:
        return name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")

    index = pickle.loads((folder / ".metadata").read_bytes())
    index.state_dict_metadata = {old(name): entry for name, entry in index.state_dict_metadata.items()}
    index.storage_data = {replace(key, fqn=old(key.fqn)): place for key, place in index.storage_data.items()}
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    listed_again(folder)


CHANGED = "step_000002 is not usable ({file} is damaged.*); trying an older one"
SIZE = r"step_000002 is not usable \(({file} has \d+ bytes instead of \d+|complete.json is damaged)\)"
LIST = r"step_000002 is not usable \(complete.json is damaged\)"
CASES: dict[str, Case] = {
    "undamaged": Case(nothing, r"step_000002: \d+ files equal their digests \(.* GB, .* GB/s\)", on="", used=True),
    "one bit": Case(one_bit, CHANGED.replace("(", r"\(").replace(")", r"\)")),
    "zeros": Case(zeros, CHANGED.replace("(", r"\(").replace(")", r"\)")),
    "cut": Case(cut, SIZE),
    "grown": Case(grown, SIZE),
    "gone": Case(gone, r"step_000002 is not usable \(({file} is missing|half-written: no {file})\)"),
    "a folder instead": Case(unreadable, r"step_000002 is not usable \({file} (is missing|cannot be read: .*)\)"),
    "list: []": Case(written(b"[]"), LIST, COMPLETE),
    "list: null": Case(written(b"null"), LIST, COMPLETE),
    "list: empty": Case(written(b""), LIST, COMPLETE),
    "list: files is a list": Case(written(b'{"files": []}'), LIST, COMPLETE),
    "list: no files": Case(
        written(b'{"files": {}}'), r"complete.json is damaged: it does not list .metadata", COMPLETE
    ),
    "list: no files, no digests": Case(
        written(b'{"files": {}, "xxh3_128": {}}'), r"complete.json is damaged: it does not list .metadata", COMPLETE
    ),
    "list: not UTF-8": Case(written(b'{"files": {"\xff": 1}}'), LIST, COMPLETE),
    "list: nested": Case(written(b"[" * 100_000), LIST, COMPLETE),
    "list: 5000 digits": Case(written(b'{"files": {".metadata": ' + b"9" * 5000 + b"}}"), LIST, COMPLETE),
    "list: size is text": Case(edited(lambda c: c["files"].update({"common.pt": "1"})), LIST, COMPLETE),
    "list: size is true": Case(edited(lambda c: c["files"].update({"common.pt": True})), LIST, COMPLETE),
    "list: outside": Case(edited(lambda c: c["files"].update({"../x": 1})), LIST, COMPLETE),
    "list: a digest is missing": Case(edited(lambda c: c["xxh3_128"].pop("common.pt")), LIST, COMPLETE),
    "list: digests are null": Case(edited(lambda c: c.update({"xxh3_128": None})), LIST, COMPLETE),
    "list: other key": Case(edited(lambda c: c.update({"xxh3_129": c.pop("xxh3_128")})), LIST, COMPLETE),
    "old format": Case(without_digests(nothing), "step_000002 was written without digests", on="", used=True),
    "old format, index": Case(without_digests(zeros, ".metadata"), r"\(.metadata is damaged: ", on=""),
    "old format, common": Case(without_digests(zeros, "common.pt"), r"\(common.pt is damaged: ", on=""),
    "old format, format": Case(without_digests(zeros, "metadata.json"), r"\(metadata.json is damaged: ", on=""),
    "old format, shards": Case(without_digests(zeros, "*.distcp"), r"\(it cannot be read: ", on=""),
    "index runs code": Case(index_runs_code, r"\(.metadata is damaged: it names posix.mkdir", on=""),
    "common state runs code": Case(common_runs_code, r"\(common.pt is damaged: Weights only load failed", on=""),
    "shard runs code": Case(shard_runs_code, r"\(it cannot be read: Weights only load failed", on=""),
    "index leaves the folder": Case(index_leaves_the_folder, r"it refers to '../step_000001/", on=""),
    "old names": Case(
        old_norm_names, r"step_000002 names the norm .* \d+ entries are renamed", on="", used=True, experts_only=True
    ),
}
