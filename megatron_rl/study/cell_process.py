"""The process of a cell: the ordinary command in a session of its own, which ends when the pool's process ends.

Without CUDA the pool imports the training stack once and forks its cells. With CUDA every cell is a new process.
"""

import gc
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from megatron_rl.forking import flush_output, has_one_thread, name_process, report_error, run_as_command
from megatron_rl.launch.fork import ForkedProcess
from megatron_rl.launch.ranks import one_thread, prepare_fork
from megatron_rl.supervise import Leader, die_with_parent

# What a cell's fork server imports: it finds them imported.
_SERVER_MODULES = ("megatron_rl.server.app", "transformers.models.auto.modeling_auto")
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


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
        flush_output()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)  # the pool's handlers must not run in the cell
        try:
            pid = os.fork()
            if pid == 0:
                _become_cell(arguments, environment, output, parent, self._like_new, mask)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return ForkedProcess(pid)


def _become_cell(
    arguments: list[str],
    environment: Mapping[str, str],
    output: Path,
    parent: int,
    like_new: Callable[[], None],
    mask: Any,
) -> NoReturn:
    """Run the command and end this process. Never return: the pool's frames must not continue here."""
    code = 1
    try:
        os.setsid()
        die_with_parent(parent)
        for number in _HANDLED:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(environment)
        name_process("mrl-cell")
        like_new()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = run_as_command(arguments)
    except BaseException as error:  # noqa: BLE001  nothing above handles it
        code = report_error(error)
    finally:
        try:
            flush_output()
        finally:
            os._exit(code)
