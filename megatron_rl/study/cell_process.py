"""The process of a cell: the ordinary command in a session of its own, which ends when the pool's process ends.

Without CUDA the pool imports the training stack once and forks its cells. With CUDA every cell is a new process.
"""

import gc
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rl.forking import fork_as_command, has_one_thread
from megatron_rl.launch.fork import ForkedProcess
from megatron_rl.launch.ranks import one_thread, prepare_fork
from megatron_rl.supervise import Leader, die_with_parent

# What a cell's fork server imports: it finds them imported.
_SERVER_MODULES = ("megatron_rl.server.app", "transformers.models.auto.modeling_auto")
# The pool's handlers must not run in a cell.
_HANDLERS: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGUSR1: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}


class CellStarter:
    """Starts commands. The calling process must have one thread to fork; otherwise it starts new processes."""

    def __init__(self) -> None:
        with one_thread():
            self._like_new = prepare_fork()
            if self._like_new is not None:
                for name in _SERVER_MODULES:
                    importlib.import_module(name)
        if not has_one_thread():
            self._like_new = None
        gc.freeze()  # a collection in a forked process would copy every page that it walks

    def close(self) -> None:
        """Let the garbage collector see what was imported: objects that are never collected are reported as leaks."""
        gc.unfreeze()

    def start(self, arguments: list[str], environment: Mapping[str, str], output: Path) -> Leader:
        """Start `python -m megatron_rl ARGUMENTS` in a session of its own.

        Args:
            arguments: arguments of the command line.
            environment: variables in addition to those of this process.
            output: file to which the command's output is appended.
        """
        parent = os.getpid()
        if self._like_new is None:
            with output.open("ab") as file:
                return subprocess.Popen(
                    [sys.executable, "-m", "megatron_rl", *arguments],
                    env=os.environ | environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                    preexec_fn=lambda: die_with_parent(parent),  # noqa: PLW1509  it makes one system call
                )

        def begin() -> None:
            die_with_parent(parent)
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(file, 1)
            os.dup2(file, 2)

        return ForkedProcess(fork_as_command(arguments, environment, "mrl-cell", _HANDLERS, begin, self._like_new))
