"""Which kind of checkpoint a folder holds, found from names and the first bytes of files."""

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from megatron_rl.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"


class Kind(Enum):
    """A kind of checkpoint, in words."""

    HUGGING_FACE = "a Hugging Face folder"
    TORCH_DIST = "a torch_dist checkpoint"
    LEGACY = "a legacy Megatron checkpoint (mp_rank_* files)"
    PICKLED = "a folder of pickled weights (*.bin)"
    ADAPTER = "an adapter (LoRA)"
    UNFINISHED = "an unfinished conversion"


_MENDS = {
    Kind.LEGACY: "convert it with the Megatron-LM that wrote it (tools/checkpoint, --target-ckpt-format torch_dist)",
    Kind.PICKLED: "load it with transformers where you trust it, and save it with save_pretrained",
    Kind.ADAPTER: "merge the adapter into its base model, and give the merged folder",
    Kind.UNFINISHED: "run the same conversion again, which goes on where it stopped",
}


@dataclass(frozen=True)
class FoundCheckpoint:
    """What `find_kind` found.

    Attributes:
        kind: kind of the checkpoint.
        folder: the folder that holds the weights, which may lie below the given one.
        iteration: what Megatron's tracker file names; None without one.
    """

    kind: Kind
    folder: Path
    iteration: str | None = None

    @property
    def mend(self) -> str:
        """What to do with a kind that cannot be read."""
        return _MENDS.get(self.kind, "")


def find_kind(path: Path) -> FoundCheckpoint:
    """Return the kind of checkpoint in a folder. A run folder and a Megatron root lead to their newest checkpoint.

    Raises:
        CheckpointError: the folder holds no checkpoint.
    """
    if not path.is_dir():
        raise CheckpointError(f"no folder at {path}: give a checkpoint's folder")
    if (path / TRACKER).is_file():
        return _of_tracker(path)
    if (path / "checkpoints").is_dir() and (path / "config.yaml").is_file():
        steps = sorted(step for step in (path / "checkpoints").glob("step_*") if (step / "complete.json").is_file())
        if not steps:
            raise CheckpointError(f"{path} is a run folder without a complete checkpoint")
        return FoundCheckpoint(Kind.TORCH_DIST, steps[-1])
    for kind, present in (
        (Kind.UNFINISHED, (path / "plan.json").is_file() and path.suffix == ".partial"),
        (Kind.TORCH_DIST, (path / ".metadata").is_file()),
        (Kind.HUGGING_FACE, (path / "config.json").is_file() and any(path.glob("*.safetensors"))),
        (Kind.LEGACY, any(path.glob("mp_rank_*"))),
        (Kind.ADAPTER, (path / "adapter_config.json").is_file()),
        (Kind.PICKLED, any(path.glob("*.bin")) or any(path.glob("*.pth"))),
        (Kind.HUGGING_FACE, (path / "config.json").is_file()),
    ):
        if present:
            return FoundCheckpoint(kind, path)
    raise CheckpointError(
        f"{path} holds no checkpoint: neither config.json with safetensors files, nor .metadata of torch_dist, nor "
        f"{TRACKER}"
    )


def _of_tracker(root: Path) -> FoundCheckpoint:
    text = (root / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    if text == "release":
        folder = root / "release"
    elif re.fullmatch("[0-9]{1,18}", text):
        folder = root / f"iter_{int(text):07d}"
    else:
        raise CheckpointError(f"{root / TRACKER} holds {text[:40]!r}, a number or 'release' is needed")
    if not folder.is_dir():
        raise CheckpointError(f"{root / TRACKER} names {folder.name}, which does not exist: the copy is incomplete")
    kind = Kind.TORCH_DIST if (folder / ".metadata").is_file() else Kind.LEGACY
    return FoundCheckpoint(kind, folder, text)
