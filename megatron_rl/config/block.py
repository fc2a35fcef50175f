"""The base class of every section, with the rules that hold for all keys."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator

LARGEST = 2**31 - 1  # limit of a number whose key has no upper limit of its own; many counts are 32-bit further down
LONGEST_TEXT = 4096  # characters of a text or path, the limit of a path on Linux
LONGEST_NAME = 255  # bytes of a file name


class Block(BaseModel):
    """A section.

    Unknown keys are errors, numbers are finite and at most `LARGEST`, texts have at most `LONGEST_TEXT` characters, and
    a section without keys has its defaults.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_means_defaults(cls, data: Any) -> Any:
        """Replace null by an empty mapping where a mapping is expected: YAML reads a section without keys as null."""
        if not isinstance(data, dict):
            return data
        empty = [name for name, value in data.items() if value is None and cls._is_mapping(name)]
        return {**data, **{name: {} for name in empty}}

    @classmethod
    def _is_mapping(cls, name: str) -> bool:
        kind = cls.model_fields[name].annotation if name in cls.model_fields else None
        kind = getattr(kind, "__origin__", kind)
        return isinstance(kind, type) and issubclass(kind, (BaseModel, dict))

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for numbers: pydantic reads them as 1 and 0."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in (int, float):
            raise ValueError(f"it is {str(value).lower()}, not a number")
        return value

    @field_validator("*")
    @classmethod
    def _within_limits(cls, value: Any, info: ValidationInfo) -> Any:
        """Check the size of numbers, texts and paths."""
        rules = cls.model_fields[str(info.field_name)].metadata
        limited = any(getattr(rule, name, None) is not None for rule in rules for name in ("le", "lt"))
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, (int, float)) and not limited and abs(one) > LARGEST:
                raise ValueError(f"it is {one:g}; a number is at most {LARGEST}")
            if isinstance(one, (str, Path)):
                _check_text(str(one), is_path=isinstance(one, Path))
        return value


def _check_text(text: str, *, is_path: bool) -> None:
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"it has {len(text)} characters; a text has at most {LONGEST_TEXT}")
    if "\0" in text:
        raise ValueError("it has the character U+0000, which no value may have")
    if is_path:
        check_names(text)
        if text.startswith("~"):
            raise ValueError(f"it is {text}; ~ is not replaced by the home folder: write the whole path")


def check_names(path: str) -> None:
    """Raise ValueError if a part of a path is longer than a file name may be."""
    for part in path.split("/"):
        size = len(part.encode("utf-8", "surrogateescape"))
        if size > LONGEST_NAME:
            raise ValueError(
                f"'{part[:20]}...' has {size} bytes; the name of a file or folder has at most {LONGEST_NAME}"
            )
