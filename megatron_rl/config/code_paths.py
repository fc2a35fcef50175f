"""The user's own code in a configuration: which keys name it, where a relative file lies, and digests of the sources.

A digest covers the file that an import path names, not what that file imports.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rl.config.schema import Config
from megatron_rl.plugins import absolute_import_path, is_import_path, source_digest

CODE_KEYS = (("task", "name"), ("task", "reward"), ("objective", "name"), ("objective", "teacher", "name"))
_LOGGERS = ("run", "loggers")  # they do not change what a run computes, so they have no digest


def resolve_code_paths(tree: dict[str, Any], folder: Path) -> None:
    """Make the files of import paths absolute in a nested mapping, in place. Relative ones are relative to `folder`."""
    for *sections, last in (*CODE_KEYS, _LOGGERS):
        block = _block(tree, sections)
        if isinstance(block, dict) and last in block:
            block[last] = _absolute(block[last], folder)


def code_paths(config: Config) -> dict[str, str]:
    """Return the import path of every key that names the user's own code."""
    tree = config.model_dump(mode="json")
    found = {".".join(path): (_block(tree, path[:-1]) or {}).get(path[-1]) for path in CODE_KEYS}
    return {key: str(value) for key, value in found.items() if _names_code(value)}


def code_digests(config: Config) -> dict[str, str]:
    """Return the SHA-256 of the source of every key that names the user's own code. Raise ConfigError without it."""
    return {key: source_digest(path, key) for key, path in code_paths(config).items()}


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_absolute(one, folder) for one in value]
    return absolute_import_path(value, folder) if _names_code(value) else value


def _names_code(value: Any) -> bool:
    return isinstance(value, str) and is_import_path(value)


def _block(tree: Any, sections: Any) -> Mapping[str, Any] | None:
    for name in sections:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, Mapping) else None
