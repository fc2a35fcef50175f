"""The exceptions of the project: one base class and five kinds of error.

A message says what is wrong, where (file:line, key path, tensor name) and how to fix it. The command line prints
the message of these errors in one paragraph and exits with status 2. Any other exception is a bug and shows its
traceback.
"""

import difflib
from collections.abc import Iterable
from typing import Any


class MegatronRLError(Exception):
    """Base class of every error that a user can cause or fix.

    Attributes:
        everywhere: True if the same error is raised on all ranks, so that only one rank prints it.
    """

    everywhere = False


class UserError(MegatronRLError):
    """Bad data or a bad call: a malformed line, a tensor of the wrong shape, a non-finite reward."""


class ConfigError(MegatronRLError):
    """The configuration cannot be honored: unknown key, layout that does not divide, budget too small."""


class CheckpointError(MegatronRLError):
    """A checkpoint or weight file is missing, truncated, of the wrong shape, or does not match the model."""


class EngineError(MegatronRLError):
    """A rollout engine is unreachable, refused a request, or holds weights other than the expected ones."""


class PrecisionError(MegatronRLError):
    """A requested precision is not active, or the numbers left the finite range."""


_LONGEST = 200  # characters of a value in a message


def shorten(text: str) -> str:
    """Return a text for a message: at most 200 characters, and how many there were."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


def did_you_mean(given: Any, valid: Iterable[Any]) -> str:
    """Return "did you mean 'x'? valid: x, y" for an error message."""
    valid = list(valid)
    near = difflib.get_close_matches(str(given)[:_LONGEST], valid, n=1, cutoff=0.0)
    lead = f"did you mean '{near[0]}'? " if near else ""
    return f"{lead}valid: {', '.join(valid)}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, at most 300 characters; its type's name if the text is empty."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
