"""Every error that ends a command has one exit code, which says whether to start the command again."""

import errno

import pytest
from torch.distributed import DistBackendError

from megatron_rl.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    ExitCode,
    PrecisionError,
    StorageError,
    UserError,
    exit_code,
)

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:36526."


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a key"), ExitCode.USER),
        (UserError("data"), ExitCode.USER),
        (PrecisionError("a format"), ExitCode.USER),
        (CheckpointError("another model"), ExitCode.USER),
        (StorageError("a full disk"), ExitCode.RETRY),
        (EngineError("gone"), ExitCode.RETRY),
        (RuntimeError(GLOO), ExitCode.RETRY),
        (DistBackendError("NCCL communicator was aborted on rank 0"), ExitCode.RETRY),
        (OSError(errno.ENOSPC, "No space left on device"), ExitCode.RETRY),
        (OSError(errno.ESTALE, "Stale file handle"), ExitCode.RETRY),
        (FileNotFoundError(errno.ENOENT, "No such file"), ExitCode.CRASH),
        (RuntimeError("a bug"), ExitCode.CRASH),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED),
    ],
    ids=repr,
)
def test_an_exit_code_tells_what_may_go_away(error, code):
    assert exit_code(error) == code
