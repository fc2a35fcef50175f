"""The exceptions of the project, and the exit codes of all its commands.

A message says what is wrong, where (file:line, key path, tensor name) and how to fix it. The command line prints
the message of these errors in one paragraph. Any other exception is a bug and shows its traceback.
"""

import difflib
import errno
from collections.abc import Iterable
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """How a command ended. The program that started it decides by this code whether to start it again.

    DONE: it did what was asked.
    CRASH: a bug, or a comparison that was asked for found a difference.
    USER: an error that the same command meets again: a bad key, bad data, a missing file.
    RETRY: an error that may go away: a lost engine or rank, a full disk. A run can be resumed.
    INTERRUPTED: a stop was requested. A run has saved its last whole step and can be resumed.

    A command that a signal n ended has 128 + n.
    """

    DONE = 0
    CRASH = 1
    USER = 2
    RETRY = 75
    INTERRUPTED = 130


class MegatronRLError(Exception):
    """Base class of every error that a user can cause or fix.

    Attributes:
        everywhere: True if the same error is raised on all ranks, so that only one rank prints it.
        exit_code: exit code of a command that this error ends.
    """

    everywhere = False
    exit_code = ExitCode.USER


class UserError(MegatronRLError):
    """Bad data or a bad call: a malformed line, a tensor of the wrong shape, a non-finite reward."""


class ConfigError(MegatronRLError):
    """The configuration cannot be honored: unknown key, layout that does not divide, budget too small."""


class CheckpointError(MegatronRLError):
    """A checkpoint or weight file is missing, truncated, of the wrong shape, or does not match the model."""


class StorageError(CheckpointError):
    """A file of a run cannot be written or read at present: a full disk, a lost mount."""

    exit_code = ExitCode.RETRY


class EngineError(MegatronRLError):
    """A rollout engine is unreachable, refused a request, or holds weights other than the expected ones."""

    exit_code = ExitCode.RETRY


class PrecisionError(MegatronRLError):
    """A requested precision is not active, or the numbers left the finite range."""


_NO_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)
_LOST_PEER = ("DistBackendError", "DistNetworkError", "DistStoreError")  # classes of torch.distributed


def exit_code(error: BaseException) -> ExitCode:
    """Return the exit code of a command that an error ends."""
    if isinstance(error, MegatronRLError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    gone = is_lost_peer(error) or (isinstance(error, OSError) and error.errno in _NO_STORAGE)
    return ExitCode.RETRY if gone else ExitCode.CRASH


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an error says that another rank of the run is gone or does not respond."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, RuntimeError) and ("/gloo/" in str(error) or not names.isdisjoint(_LOST_PEER))


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
