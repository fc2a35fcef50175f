"""Reading YAML into plain values: bounded in size, nodes and depth, with the place of every key.

The result has mappings with text keys, lists, text, numbers, booleans and null, and nothing else. A date is text. No
input, however malformed or large, raises anything but ConfigError or takes more than seconds.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megatron_rl.errors import ConfigError, shorten

MAX_BYTES = 1 << 20
MAX_NODES = 20_000  # an alias counts as often as it is used
MAX_DEPTH = 32
_MAX_NUMBER = 100  # characters; a longer number takes quadratic time to read and cannot be printed

KeyPath = tuple[str, ...]
KeySources = dict[KeyPath, str]

_TAG = "tag:yaml.org,2002:"
_NUMBERS = {f"{_TAG}int": "integer", f"{_TAG}float": "number"}
_CONSTANTS = {f"{_TAG}bool": "boolean", f"{_TAG}null": "null"}
_TEXTS = {f"{_TAG}{name}" for name in ("str", "timestamp", "value", "merge")}
# YAML 1.1 reads 010 as 8 and 1:30 as 90, YAML 1.2 reads 10 and text.
_AMBIGUOUS = re.compile(r"[-+]?0[0-9_]+|.*:.*")


class _Loader(yaml.SafeLoader):
    """Composes at most MAX_NODES nodes, nested at most MAX_DEPTH deep."""

    nodes = 0
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose one node and the nodes in it. Raise MarkedYAMLError beyond the bounds."""
        self.nodes += 1
        problem = _beyond_bounds(self.nodes, self.depth)
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def read_file(path: Path, places: KeySources) -> Any:
    """Return the value of a YAML file; None if it is empty. Write the place of every key, `file:line`, to `places`.

    Raises:
        ConfigError: the file cannot be read, is too large, or is not YAML as above. The message has file:line.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(f"{path} has {size} bytes; a configuration has at most {MAX_BYTES}: is it another file?")
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error})") from error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8: save the file as UTF-8"
        ) from None
    return _Reader(str(path), places, has_lines=True).read(text)


def read_value(text: str, place: str) -> Any:
    """Return the value of one line of YAML. Raise ConfigError, which begins with `place`."""
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{place}: the value has {len(text)} characters; it has at most {MAX_BYTES}")
    return _Reader(place, {}, has_lines=False).read(text)


class _Reader:
    def __init__(self, source: str, places: KeySources, *, has_lines: bool) -> None:
        self._source, self._places, self._has_lines = source, places, has_lines
        self._visits = 0
        self._loader: _Loader

    def read(self, text: str) -> Any:
        """Return the value of a text."""
        try:
            self._loader = _Loader(text)
            node = self._loader.get_single_node()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            problem = ", ".join(filter(None, (error.context, error.problem)))
            place = self._source if mark is None else self._line(mark)
            raise ConfigError(f"{place}: the value is not valid YAML: {shorten(problem)}") from None
        except (yaml.YAMLError, ValueError) as error:  # ValueError: \U00110000 is no character
            problem = " ".join(str(error).split())
            raise ConfigError(f"{self._source}: the value is not valid YAML: {shorten(problem)}") from None
        return None if node is None else self._value(node, (), 0)

    def _value(self, node: yaml.Node, at: KeyPath, depth: int) -> Any:
        """Return the value of a node. The visits are counted, because aliases can make few nodes very many values."""
        self._visits += 1
        problem = _beyond_bounds(self._visits, depth)
        if problem:
            raise self._error(node, problem)
        if isinstance(node, yaml.MappingNode):
            self._check_tag(node, f"{_TAG}map", "mapping")
            return self._mapping(node, at, depth)
        if isinstance(node, yaml.SequenceNode):
            self._check_tag(node, f"{_TAG}seq", "list")
            return [self._value(one, (*at, str(i)), depth + 1) for i, one in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, at: KeyPath, depth: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for merged in self._merged(node):
            inherited = self._value(merged, at, depth + 1)
            out = {**inherited, **out}
        own = set()
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._error(key_node, "a key must be text, not a list or a mapping")
            key = self._text(key_node)
            name = ".".join((*at, key))
            if key in own:
                raise self._error(key_node, f"key '{shorten(name)}' is given twice")
            own.add(key)
            self._places[(*at, key)] = self._line(key_node.start_mark)
            out[key] = self._value(value_node, (*at, key), depth + 1)
        return out

    def _merged(self, node: yaml.MappingNode) -> Iterator[yaml.MappingNode]:
        """Yield the mappings that `<<` merges into a mapping. An earlier one wins over a later one."""
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                for one in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    if not isinstance(one, yaml.MappingNode):
                        raise self._error(key_node, "'<<' merges a mapping or a list of mappings")
                    yield one

    def _scalar(self, node: yaml.Node) -> Any:
        if node.tag in _TEXTS:
            return self._text(node)
        kind = _NUMBERS.get(node.tag) or _CONSTANTS.get(node.tag)
        if kind is None:
            raise self._unknown_tag(node)
        if node.tag in _NUMBERS:
            if len(node.value) > _MAX_NUMBER:
                raise self._error(node, f"a number has {len(node.value)} characters; at most {_MAX_NUMBER} are read")
            if _AMBIGUOUS.fullmatch(node.value):
                raise self._error(
                    node, f"YAML versions read {node.value} differently: quote it if it is text, or write it in decimal"
                )
        try:
            return self._loader.construct_object(node)
        except (yaml.YAMLError, ValueError, KeyError, IndexError):
            raise self._error(node, f"'{shorten(node.value)}' is not a YAML {kind}: quote it if it is text") from None

    def _text(self, node: yaml.Node) -> str:
        text = str(node.value)
        bad = re.search("[\0\ud800-\udfff]", text)
        if bad:
            raise self._error(node, f"the text has the character U+{ord(bad.group()):04X}, which no value may have")
        return text

    def _check_tag(self, node: yaml.Node, tag: str, kind: str) -> None:
        if node.tag.startswith(_TAG) and node.tag.removeprefix(_TAG) in ("str", "int", "float", "bool", "null"):
            raise self._error(node, f"tag '{node.tag.removeprefix(_TAG)}' stands before a {kind}: remove it")
        if node.tag != tag:
            raise self._unknown_tag(node)

    def _unknown_tag(self, node: yaml.Node) -> ConfigError:
        tag = node.tag.replace(_TAG, "!!")
        return self._error(node, f"tag '{shorten(tag)}' is not supported: remove it")

    def _error(self, node: yaml.Node, problem: str) -> ConfigError:
        return ConfigError(f"{self._line(node.start_mark)}: {problem}")

    def _line(self, mark: yaml.Mark) -> str:
        return f"{self._source}:{mark.line + 1}" if self._has_lines else self._source


def _beyond_bounds(nodes: int, depth: int) -> str | None:
    if nodes > MAX_NODES:
        return f"there are more than {MAX_NODES} values, aliases counted as often as they are used"
    if depth > MAX_DEPTH:
        return f"values are nested more than {MAX_DEPTH} deep, or an alias contains itself"
    return None
