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
        default=default, metadata={"kind": "number", "doc": doc, "above": above, "at_most": at_most, "presets": presets or {}}
    )


def choice(default: str, names: Iterable[str], doc: str) -> Any:
    """One of `names`."""
    return field(default=default, metadata={"kind": "choice", "doc": doc, "names": tuple(names)})


def checked(owner: str, option: Field, value: Any) -> Any:
    """`value` as the option wants it (a preset name becomes its number). Raises ConfigError naming `owner.option`."""
    rules, where = option.metadata, f"objective {owner}: '{option.name}'"
    if rules.get("kind") == "choice":
        if value not in rules["names"]:
            raise ConfigError(f"{where} is {value!r}; {suggest(value, rules['names'])}")
        return value
    if rules.get("kind") != "number" or (value is None and option.default is None):
        return value
    if isinstance(value, str):
        if value not in rules["presets"]:
            hint = suggest(value, rules["presets"]) if rules["presets"] else "it must be a number"
            raise ConfigError(f"{where} is {value!r}; {hint}")
        return rules["presets"][value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{where} is {value!r}; it must be a number")
    if not math.isfinite(value) or not rules["above"] < value <= rules["at_most"]:
        limit = f" and at most {rules['at_most']:g}" if math.isfinite(rules["at_most"]) else ""
        raise ConfigError(f"{where} is {value!r}; it must be finite, above {rules['above']:g}{limit} ({rules['doc']})")
    return float(value)


def suggest(given: Any, valid: Iterable[str]) -> str:
    """'did you mean 'x'? valid: x, y' for an error message."""
    valid = list(valid)
    near = difflib.get_close_matches(str(given), valid, n=1, cutoff=0.0)
    lead = f"did you mean '{near[0]}'? " if near else ""
    return f"{lead}valid: {', '.join(valid)}"
