"""Keys, and names of values, that were called otherwise in earlier versions."""

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
# Key -> old name of a value -> new name. The names are those of presets.
_DELTA = {"paper_literal": "paper", "coef_reading": "conjecture"}
RENAMED_VALUES: dict[Path, dict[str, str]] = {
    ("objective", "delta"): _DELTA,
    ("objective", "teacher", "delta"): _DELTA,
}


def find_old_keys(tree: dict[str, Any]) -> Iterator[tuple[Path, Path]]:
    """Yield (old path, new path) of every key of a nested mapping that has been renamed."""
    for section, names in RENAMED.items():
        block = _block(tree, section)
        for old, new in names.items():
            if old in block:
                yield (*section, old), (*section, new)


def find_old_values(tree: dict[str, Any]) -> Iterator[tuple[Path, str, str]]:
    """Yield (path, old name, new name) of every value of a nested mapping whose name has changed."""
    for (*section, key), names in RENAMED_VALUES.items():
        value = _block(tree, tuple(section)).get(key)
        if isinstance(value, str) and value in names:
            yield (*section, key), value, names[value]


def rename_old_keys(tree: dict[str, Any]) -> None:
    """Rename every old key, and every old name of a value, of a nested mapping in place."""
    for (*section, key), _, new_value in list(find_old_values(tree)):
        _block(tree, tuple(section))[key] = new_value
    for (*section, old), (*_, new) in list(find_old_keys(tree)):
        block = _block(tree, tuple(section))
        block[new] = block.pop(old)


def _block(tree: Any, section: Path) -> dict[str, Any]:
    for name in section:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}
