"""Keys that had another name in earlier versions."""

from collections.abc import Iterator
from typing import Any

Path = tuple[str, ...]

_OBJECTIVE = {"kl": "kl_estimator", "denominator": "ratio_denominator", "level": "ratio_level"}
# Section -> old key -> new key.
RENAMED: dict[Path, dict[str, str]] = {
    ("rollout",): {"dynamic_sampling": "max_resampled_groups"},
    ("objective",): _OBJECTIVE,
    ("objective", "teacher"): _OBJECTIVE,
    ("objective", "student"): _OBJECTIVE,
}


def find_old_keys(tree: dict[str, Any]) -> Iterator[tuple[Path, Path]]:
    """Yield (old path, new path) of every key of a nested mapping that has been renamed."""
    for section, names in RENAMED.items():
        block = _block(tree, section)
        for old, new in names.items():
            if old in block:
                yield (*section, old), (*section, new)


def rename_old_keys(tree: dict[str, Any]) -> None:
    """Rename every old key of a nested mapping in place."""
    for (*section, old), (*_, new) in list(find_old_keys(tree)):
        block = _block(tree, tuple(section))
        block[new] = block.pop(old)


def _block(tree: Any, section: Path) -> dict[str, Any]:
    for name in section:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}
