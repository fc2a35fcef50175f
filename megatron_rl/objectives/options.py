"""Options of an objective: dataclass fields with a type that pydantic checks, and the errors that the checks raise."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import Field, field
from functools import cache
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BeforeValidator, Strict, TypeAdapter, ValidationError

from megatron_rl.errors import ConfigError, did_you_mean

MOST_TOP_K = 64  # upper limit of the K requested from engines: every token transfers K pairs


def positive(
    default: float | None,
    doc: str,
    *,
    above: float = 0.0,
    at_most: float = math.inf,
    presets: Mapping[str, float] | None = None,
) -> Any:
    """Declare an option that is a finite number in (above, at_most].

    Args:
        default: default value; None is legal only as the default.
        doc: description for error messages and documentation.
        above: exclusive lower bound.
        at_most: inclusive upper bound.
        presets: names that a user may give in place of a number, and their numbers.
    """
    limit = pydantic.Field(gt=above, le=at_most, allow_inf_nan=False)
    return _option(default, doc, Annotated[float, Strict(), limit], f"above {above:g}{_limit(at_most)}", presets)


def nonnegative(default: float, doc: str, *, at_most: float = math.inf) -> Any:
    """Declare an option that is a finite number in [0, at_most].

    Args:
        default: default value.
        doc: description for error messages and documentation.
        at_most: inclusive upper bound.
    """
    limit = pydantic.Field(ge=0.0, le=at_most, allow_inf_nan=False)
    return _option(default, doc, Annotated[float, Strict(), limit], f"at least 0{_limit(at_most)}")


def integer(default: int, doc: str, *, at_least: int = 1, at_most: int = 1 << 31) -> Any:
    """Declare an option that is an integer in [at_least, at_most].

    Args:
        default: default value.
        doc: description for error messages and documentation.
        at_least: inclusive lower bound.
        at_most: inclusive upper bound.
    """
    kind = Annotated[int, Strict(), pydantic.Field(ge=at_least, le=at_most)]
    return _option(default, doc, kind, f"a whole number from {at_least} to {at_most}")


def flag(default: bool, doc: str) -> Any:
    """Declare an option that is true or false."""
    return _option(default, doc, Annotated[bool, Strict()], "true or false")


def choice(default: str | None, names: Iterable[str], doc: str) -> Any:
    """Declare an option that is one of `names`.

    Args:
        default: default value; None is legal only as the default.
        names: the legal values.
        doc: description for error messages and documentation.
    """
    names = tuple(names)
    return _option(default, doc, Literal[names], "", names)


def _option(
    default: Any, doc: str, kind: Any, rule: str, names: Iterable[str] | Mapping[str, float] | None = None
) -> Any:
    if isinstance(names, Mapping):
        kind = Annotated[kind, BeforeValidator(_Preset(names))]
    return field(default=default, metadata={"kind": kind, "doc": doc, "rule": rule, "names": tuple(names or ())})


def _limit(at_most: float) -> str:
    return f" and at most {at_most:g}" if math.isfinite(at_most) else ""


class _Preset:
    """Replaces the name of a preset by its number."""

    def __init__(self, presets: Mapping[str, float]) -> None:
        self.presets = presets

    def __call__(self, value: Any) -> Any:
        return self.presets.get(value, value) if isinstance(value, str) else value


@cache
def _adapter(option: Field[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(option.metadata["kind"])


def checked(owner: str, option: Field[Any], value: Any) -> Any:
    """Return `value` after the option's check; a preset name is replaced by its number.

    Args:
        owner: name of the objective or correction, for the message.
        option: the dataclass field that holds the type.
        value: the value that the user gave.

    Raises:
        ConfigError: the value is illegal; the message names `owner` and `option.name`.
    """
    rules = option.metadata
    if "kind" not in rules or (value is None and option.default is None):
        return value
    try:
        return _adapter(option).validate_python(value)
    except ValidationError:
        named = isinstance(value, str) or not rules["rule"]
        hint = did_you_mean(value, rules["names"]) if rules["names"] and named else f"it must be {_rule(rules, value)}"
        raise ConfigError(f"objective {owner}: '{option.name}' is {value!r}; {hint} ({rules['doc']})") from None


def _rule(rules: Mapping[str, Any], value: Any) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    finite = rules["rule"].startswith(("above", "at least"))
    return f"finite, {rules['rule']}" if finite and number else "a number" if finite else rules["rule"]
