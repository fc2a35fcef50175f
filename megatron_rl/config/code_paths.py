"""The user's own code in a configuration: which keys name it, where a relative file lies, and digests of the sources.

A digest covers the file that an import path names, not what that file imports.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rl.config.schema import Config
from megatron_rl.plugins import absolute_import_path, is_import_path, source_digest

CODE_KEYS = (("task", "name"), ("task", "reward"), ("objective", "name"), ("objective", "teacher", "name"))


def resolve_code_paths(tree: dict[str, Any], folder: Path) -> None:
    """Make the files of import paths absolute in a nested mapping, in place. Relative ones are relative to `folder`."""
    for *sections, last in CODE_KEYS:
        block = _block(tree, sections)
        if isinstance(block, dict) and _names_code(block.get(last)):
            block[last] = absolute_import_path(block[last], folder)


def code_paths(config: Config) -> dict[str, str]:
    """Return the import path of every key that names the user's own code."""
    tree = config.model_dump(mode="json")
    found = {".".join(path): (_block(tree, path[:-1]) or {}).get(path[-1]) for path in CODE_KEYS}
    return {key: str(value) for key, value in found.items() if _names_code(value)}


def code_digests(config: Config) -> dict[str, str]:
    """Return the SHA-256 of the source of every key that names the user's own code. Raise ConfigError without it."""
    return {key: source_digest(path, key) for key, path in code_paths(config).items()}


def _names_code(value: Any) -> bool:
    return isinstance(value, str) and is_import_path(value)


def _block(tree: Any, sections: Any) -> Mapping[str, Any] | None:
    for name in sections:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, Mapping) else None
