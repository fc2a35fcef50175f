"""Descriptions of the configuration's keys, and the configuration as YAML with these descriptions as comments."""

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_rl.config.schema import Config

REQUIRED = "required"  # stands for the default of a key that has none

_KINDS = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    Path: "path",
    NoneType: "null",
    Any: "any",
}
_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class KeyDoc:
    """One key.

    Attributes:
        path: names of the sections and of the key.
        kind: its type and limits, in words.
        default: its default as a plain value; `REQUIRED` if it has none.
        description: what it does.
    """

    path: tuple[str, ...]
    kind: str
    default: Any
    description: str

    @property
    def name(self) -> str:
        """The dotted name, as in an override."""
        return ".".join(self.path)


def key_docs(model: type[BaseModel] = Config, path: tuple[str, ...] = ()) -> Iterator[KeyDoc]:
    """Yield every key of a section and of the sections in it, in the order of the schema.

    Keys of objectives are not in the schema.
    """
    for name, field in model.model_fields.items():
        inner = field.annotation
        if inspect.isclass(inner) and issubclass(inner, BaseModel):
            yield from key_docs(inner, (*path, name))
        else:
            default = REQUIRED if field.is_required() else _plain(field.get_default(call_default_factory=True))
            yield KeyDoc((*path, name), _kind(field), default, field.description or "")


def section_docs(model: type[BaseModel] = Config, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the path of every section and the first line of its docstring."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if inspect.isclass(inner) and issubclass(inner, BaseModel):
            yield (*path, name), inspect.getdoc(inner).splitlines()[0]  # type: ignore[union-attr]  # sections have one
            yield from section_docs(inner, (*path, name))


def default_tree() -> dict[str, Any]:
    """Return the defaults of all keys, section -> key -> plain value; `REQUIRED` where there is none."""
    tree: dict[str, Any] = {}
    for key in key_docs():
        block = tree
        for section in key.path[:-1]:
            block = block.setdefault(section, {})
        block[key.path[-1]] = key.default
    return tree


def annotated_yaml(tree: Mapping[str, Any], more: Mapping[tuple[str, ...], str]) -> str:
    """Return a configuration as YAML, with the description of every section and key as a comment above it.

    Args:
        tree: the configuration as plain values, `Config.model_dump(mode="json")` or `default_tree()`.
        more: descriptions of keys that are not in the schema, by path.
    """
    texts = {**dict(section_docs()), **{key.path: key.description for key in key_docs()}, **more}
    sections = {path for path, _ in section_docs()}
    return "\n".join(_lines(tree, (), texts, sections)).strip() + "\n"


def _lines(
    tree: Mapping[str, Any],
    at: tuple[str, ...],
    texts: Mapping[tuple[str, ...], str],
    sections: set[tuple[str, ...]],
) -> Iterator[str]:
    indent = "  " * len(at)
    for name, value in tree.items():
        path = (*at, name)
        if len(path) == 1:
            yield ""
        if texts.get(path):
            yield f"{indent}# {texts[path]}"
        if path in sections:
            yield f"{indent}{name}:"
            yield from _lines(value, path, texts, sections)
        elif value == REQUIRED:
            yield f"{indent}# {name}:  (required)"
        else:
            dumped = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=math.inf)
            yield from (f"{indent}{line}" for line in dumped.splitlines())


def _plain(value: Any) -> Any:
    """Return a default as a value that YAML can show."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _kind(field: FieldInfo) -> str:
    limits = [
        f"{words} {getattr(rule, name):g}"
        for rule in field.metadata
        for name, words in _LIMITS.items()
        if getattr(rule, name, None) is not None
    ]
    return ", ".join([_type_words(field.annotation), *limits])


def _type_words(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(f"`{one}`" for one in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type_words(one) for one in arguments)
    if origin is tuple:
        inner = _type_words(arguments[0])
        return f"list of {inner}" if arguments[-1] is Ellipsis else f"list of {len(arguments)} {inner}s"
    return _KINDS.get(kind, "mapping")
