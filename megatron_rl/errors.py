"""The six exceptions of the project.

A message says what is wrong, where (file:line, key path, tensor name) and how to mend it. The command
line prints these in one paragraph and exits 2; anything else is a bug and shows its traceback.
"""


class MegatronRLError(Exception):
    """Root of every error a user can cause or mend. everywhere: the same error is raised on all ranks, so one prints it."""

    everywhere = False


class UserError(MegatronRLError):
    """Bad data or a bad call: a malformed line, a tensor of the wrong shape, a non-finite reward."""


class ConfigError(MegatronRLError):
    """The configuration cannot be honored: unknown key, layout that does not divide, budget too small."""


class CheckpointError(MegatronRLError):
    """A checkpoint or weight file is missing, truncated, of the wrong shape, or does not match the model."""


class EngineError(MegatronRLError):
    """A rollout engine is unreachable, refused a request, or holds other weights than it should."""


class PrecisionError(MegatronRLError):
    """A requested precision is not active, or the numbers left the finite range."""
