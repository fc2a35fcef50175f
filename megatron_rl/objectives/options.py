"""Options of an objective: dataclass fields that carry their own check, and the errors they raise."""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import Field, field
from typing import Any

from megatron_rl.errors import ConfigError


def positive(
    default: float | None,
    doc: str,
    *,
    above: float = 0.0,
    at_most: float = math.inf,
    presets: Mapping[str, float] | None = None,
) -> Any:
    """A finite number in (above, at_most], or the name of a preset; None is legal only as the default."""
    return field(
        default=default,
        metadata={"kind": "number", "doc": doc, "above": above, "at_most": at_most, "presets": presets or {}},
    )


def nonnegative(default: float, doc: str, *, at_most: float = math.inf) -> Any:
    """A finite number in [0, at_most]."""
    return field(
        default=default,
        metadata={"kind": "number", "doc": doc, "above": -math.inf, "at_least": 0.0, "at_most": at_most},
    )


def integer(default: int, doc: str, *, at_least: int = 1, at_most: int = 1 << 31) -> Any:
    """A whole number in [at_least, at_most]."""
    return field(default=default, metadata={"kind": "integer", "doc": doc, "at_least": at_least, "at_most": at_most})


def flag(default: bool, doc: str) -> Any:
    """true or false."""
    return field(default=default, metadata={"kind": "flag", "doc": doc})


def choice(default: str | None, names: Iterable[str], doc: str) -> Any:
    """One of `names`; None is legal only as the default."""
    return field(default=default, metadata={"kind": "choice", "doc": doc, "names": tuple(names)})


def checked(owner: str, option: Field, value: Any) -> Any:
    """`value` as the option wants it (a preset name becomes its number). Raises ConfigError naming `owner.option`."""
    rules, where = option.metadata, f"objective {owner}: '{option.name}'"
    if "kind" not in rules or (value is None and option.default is None):
        return value
    if rules["kind"] == "choice":
        if value not in rules["names"]:
            raise ConfigError(f"{where} is {value!r}; {suggest(value, rules['names'])}")
        return value
    if rules["kind"] == "flag":
        if not isinstance(value, bool):
            raise ConfigError(f"{where} is {value!r}; it must be true or false ({rules['doc']})")
        return value
    if rules["kind"] == "integer":
        low, high = rules["at_least"], rules["at_most"]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"{where} is {value!r}; it must be a whole number from {low} to {high} ({rules['doc']})")
        return value
    return _checked_number(where, rules, value)


def _checked_number(where: str, rules: Mapping[str, Any], value: Any) -> float:
    presets = rules.get("presets", {})
    if isinstance(value, str):
        if value not in presets:
            hint = suggest(value, presets) if presets else "it must be a number"
            raise ConfigError(f"{where} is {value!r}; {hint}")
        return presets[value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{where} is {value!r}; it must be a number")
    least = rules.get("at_least")
    if (
        not math.isfinite(value)
        or not rules["above"] < value <= rules["at_most"]
        or (least is not None and value < least)
    ):
        floor = f"above {rules['above']:g}" if least is None else f"at least {least:g}"
        limit = f" and at most {rules['at_most']:g}" if math.isfinite(rules["at_most"]) else ""
        raise ConfigError(f"{where} is {value!r}; it must be finite, {floor}{limit} ({rules['doc']})")
    return float(value)


def suggest(given: Any, valid: Iterable[str]) -> str:
    """'did you mean 'x'? valid: x, y' for an error message."""
    valid = list(valid)
    near = difflib.get_close_matches(str(given), valid, n=1, cutoff=0.0)
    lead = f"did you mean '{near[0]}'? " if near else ""
    return f"{lead}valid: {', '.join(valid)}"
