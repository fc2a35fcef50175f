"""Loading a configuration: YAML with dotted overrides. Errors name file, line and key."""

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_rl.config.code_paths import resolve_code_paths
from megatron_rl.config.old_keys import find_old_keys, rename_old_keys
from megatron_rl.config.rules import check_rules
from megatron_rl.config.schema import Config
from megatron_rl.errors import ConfigError


# Keys whose values, text or a list of texts, may be import paths.
def load_config(path: Path | str, overrides: list[str] | None = None, *, accept_old_keys: bool = False) -> Config:
    """Read YAML, apply dotted overrides such as `rollout.temperature=0.9`, and validate.

    A file of the user's own code is relative to the folder of the YAML file; in an override it is relative to the
    current folder. The result has absolute paths.

    Args:
        path: the YAML file.
        overrides: each `section.key=value`.
        accept_old_keys: rename the keys of earlier versions. For the `config.yaml` that a run folder holds.

    Raises:
        ConfigError: naming file:line and key path of the first problem.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no configuration file at {path}")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    lines: dict[tuple[str, ...], str] = {}
    tree = _plain(node, (), lines, str(path)) if node is not None else {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of sections")
    if accept_old_keys:
        rename_old_keys(tree)
    resolve_code_paths(tree, path.parent)
    for override in overrides or []:
        _apply(tree, override, lines)
    resolve_code_paths(tree, Path.cwd())
    return make_config(tree, lines)


def make_config(tree: dict[str, Any], lines: dict[tuple[str, ...], str] | None = None) -> Config:
    """Validate a nested mapping. `lines` maps key paths to file:line for the errors. Raises ConfigError."""
    lines = lines or {}
    for old, new in find_old_keys(tree):
        place = lines.get(old)
        raise ConfigError(
            f"{f'{place}: ' if place else ''}key '{'.'.join(old)}' is now called '{'.'.join(new)}': rename it"
        )
    try:
        config = Config(**tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, lines)) from error
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


def _plain(node: yaml.Node, at: tuple[str, ...], lines: dict[tuple[str, ...], str], file: str) -> Any:
    """Return the value of a YAML node, and write the place of every key to `lines`."""
    if not isinstance(node, yaml.MappingNode):
        return yaml.safe_load(yaml.serialize(node))
    out: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        place = f"{file}:{key_node.start_mark.line + 1}"
        if key in out:
            raise ConfigError(f"{place}: key '{'.'.join((*at, key))}' is given twice")
        lines[(*at, key)] = place
        out[key] = _plain(value_node, (*at, key), lines, file)
    return out


def _apply(tree: dict[str, Any], override: str, lines: dict[tuple[str, ...], str]) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override '{override}' must read section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override '{override}': '{section}' is not a section")
    try:
        tree[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{override}': the value is not valid YAML ({error})") from error
    lines[(*sections, last)] = f"override '{override}'"


def _explain(error: ValidationError, lines: dict[tuple[str, ...], str]) -> str:
    problems = []
    for item in error.errors():
        where = tuple(str(part) for part in item["loc"])
        key = ".".join(where)
        place = lines.get(where)
        prefix = f"{place}: " if place else ""
        if item["type"] == "extra_forbidden":
            valid = list(_fields_at(where[:-1]))
            near = difflib.get_close_matches(where[-1], valid, n=1, cutoff=0.0)
            problems.append(f"{prefix}unknown key '{key}'; did you mean '{'.'.join((*where[:-1], *near))}'?")
        elif item["type"] == "missing":
            problems.append(f"key '{key}' is missing and has no default")
        elif not where or item["type"] == "value_error":
            message = str(item.get("ctx", {}).get("error", item["msg"]))
            problems.append(f"{prefix}{key + ': ' if key else ''}{message}")
        else:
            problems.append(f"{prefix}'{key}' is {item['input']!r}: {item['msg']}")
    return "; ".join(problems)


def _fields_at(where: tuple[str, ...]) -> dict[str, Any]:
    model: Any = Config
    for part in where:
        model = model.model_fields[part].annotation
    fields: dict[str, Any] = model.model_fields
    return fields
