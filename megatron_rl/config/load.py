"""Loading a configuration: YAML with dotted overrides. Errors name file, line and key."""

import difflib
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_rl.config.block import Block
from megatron_rl.config.code_paths import resolve_code_paths
from megatron_rl.config.old_keys import find_old_keys, find_old_values, rename_old_keys
from megatron_rl.config.read_yaml import MAX_DEPTH, KeyPath, KeySources, read_file, read_value
from megatron_rl.config.rules import check_rules
from megatron_rl.config.schema import Config
from megatron_rl.errors import ConfigError, shorten

_MOST_PROBLEMS = 10  # of one message
_LONGEST_KEY = 100  # characters that are compared with the names of keys


def load_config(path: Path | str, overrides: list[str] | None = None, *, accept_old_keys: bool = False) -> Config:
    """Read YAML, apply dotted overrides such as `rollout.temperature=0.9`, and validate.

    A file of the user's own code is relative to the folder of the YAML file; in an override it is relative to the
    current folder. The result has absolute paths.

    Args:
        path: the YAML file.
        overrides: each `section.key=value`.
        accept_old_keys: rename the keys of earlier versions. For the `config.yaml` that a run folder holds.

    Raises:
        ConfigError: naming file:line and key path of the first problems.
    """
    path = Path(path)
    try:
        found = path.is_file()
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise ConfigError(f"no configuration file can be read at {shorten(str(path))} ({error.strerror})") from error
    if not found:
        raise ConfigError(f"no configuration file at {path}")
    places: KeySources = {}
    tree = read_file(path, places)
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of sections")
    if accept_old_keys:
        rename_old_keys(tree)
    resolve_code_paths(tree, path.parent)
    for override in overrides or []:
        place = f"override '{shorten(override)}'"
        key, separator, value = override.partition("=")
        if not separator:
            raise ConfigError(f"{place} must read section.key=value")
        set_key(tree, key, read_value(value, place), place, places)
    resolve_code_paths(tree, Path.cwd())
    return make_config(tree, places)


def make_config(tree: dict[str, Any], places: KeySources | None = None) -> Config:
    """Validate a nested mapping. `places` has the place of each key path for the errors. Raises ConfigError."""
    places = places or {}
    for old, new in find_old_keys(tree):
        place = places.get(old)
        raise ConfigError(
            f"{f'{place}: ' if place else ''}key '{'.'.join(old)}' is now called '{'.'.join(new)}': rename it"
        )
    for key, old_value, new_value in find_old_values(tree):
        place = places.get(key)
        raise ConfigError(
            f"{f'{place}: ' if place else ''}'{'.'.join(key)}' is '{old_value}', which is now called '{new_value}': "
            "rename it"
        )
    try:
        config = Config(**tree)
    except ValidationError as error:
        raise ConfigError(explain_problems(error, places, Config)) from error
    check_rules(config)
    return config


def changed_keys(old: Config, new: Config) -> list[str]:
    """Return `section.key: old -> new` for every value that differs."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    return [
        f"{section}.{key}: {before[section].get(key)} -> {after[section].get(key)}"
        for section in after
        for key in sorted({*before[section], *after[section]})
        if before[section].get(key) != after[section].get(key)
    ]


def set_key(tree: dict[str, Any], key: str, value: Any, place: str, places: KeySources) -> None:
    """Set one key of a nested mapping, in place. A section's value replaces the whole section.

    Args:
        tree: the mapping.
        key: `section.key`.
        value: the new value.
        place: where the user wrote it, for errors.
        places: receives the place.

    Raises:
        ConfigError: the key is malformed, or lies in something that is no section.
    """
    *sections, last = path = tuple(key.split("."))
    if not all(path):
        raise ConfigError(f"{place} must read section.key=value")
    if len(path) > MAX_DEPTH:
        raise ConfigError(f"{place}: the key has {len(path)} parts; it has at most {MAX_DEPTH}")
    for section in sections:
        if tree.get(section) is None:  # an empty section of the file
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise ConfigError(f"{place}: '{section}' is not a section")
    tree[last] = value
    places[path] = place


def explain_problems(error: ValidationError, places: KeySources, block: type[Block]) -> str:
    """Return the first problems of a validation as one line, each with its place and key.

    Args:
        error: the error of pydantic.
        places: the place of each key path.
        block: the class that was validated, for names of valid keys.
    """
    errors = error.errors(include_url=False)
    problems = [_problem(item, places, block) for item in errors[:_MOST_PROBLEMS]]
    more = len(errors) - len(problems)
    return "; ".join(problems) + (f"; and {more} more problems" if more else "")


def _problem(item: ErrorDetails, places: KeySources, block: type[Block]) -> str:
    where = tuple(str(part) for part in item["loc"])
    key = shorten(".".join(where))
    place = _place(where, places)
    prefix = f"{place}: " if place else ""
    if item["type"] == "extra_forbidden":
        valid = list(_fields_at(block, where[:-1]))
        near = difflib.get_close_matches(where[-1][:_LONGEST_KEY], valid, n=1, cutoff=0.0)
        return f"{prefix}unknown key '{key}'; did you mean '{'.'.join((*where[:-1], *near))}'?"
    if item["type"] == "missing":
        return f"{prefix}key '{key}' is missing and has no default"
    if item["type"] == "value_error" or not where:
        message = str(item.get("ctx", {}).get("error", item["msg"]))
        return f"{prefix}{key + ': ' if key else ''}{message}"
    if item["input"] is None:
        return f"{prefix}'{key}' has no value: {item['msg']}; leave the key out for its default"
    return f"{prefix}'{key}' is {shorten(repr(item['input']))}: {item['msg']}"


def _place(where: KeyPath, places: KeySources) -> str | None:
    """Return the place of a key, or of the nearest section around it that the user wrote."""
    return next((places[where[:n]] for n in range(len(where), 0, -1) if where[:n] in places), None)


def _fields_at(block: type[Block], where: tuple[str, ...]) -> dict[str, Any]:
    model: Any = block
    for part in where:
        model = model.model_fields[part].annotation
    fields: dict[str, Any] = model.model_fields
    return fields
