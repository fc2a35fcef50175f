"""Forked processes that run a command of this package as a new process would, without importing anything again."""

import atexit
import io
import os
import random
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from megatron_rl.errors import ExitCode


def has_one_thread() -> bool:
    """Return True if this process has only its main thread. Return False if there is no /proc."""
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def like_new() -> None:
    """Reset a forked process to the state of a new one: OMP_NUM_THREADS threads, and newly seeded generators."""
    import numpy as np  # seconds of import; the process has imported both
    import torch

    threads = os.environ["OMP_NUM_THREADS"]  # torch reads it only while it is imported
    if threads.isdecimal():
        torch.set_num_threads(int(threads))
    torch.default_generator.seed()
    random.seed()
    np.random.seed()


def name_process(name: str) -> None:
    """Set the name that `ps` and `top` show for this process, at most 15 characters. Linux only; nothing elsewhere."""
    with suppress(OSError):
        Path("/proc/self/comm").write_text(name, encoding="ascii")


def fork_as_command(
    arguments: list[str],
    environment: Mapping[str, str],
    name: str,
    handlers: Mapping[signal.Signals, Any],
    begin: Callable[[], None],
    reset: Callable[[], None],
) -> int:
    """Fork a process that runs `python -m megatron_rl ARGUMENTS` in a session of its own, and return its pid.

    The calling process must have one thread.

    Args:
        arguments: arguments of the command line.
        environment: variables in addition to those of this process.
        name: name that `ps` shows; the command line is that of this process.
        handlers: the handler, in the new process, of each signal that this process handles.
        begin: called in the new process once it leads its session.
        reset: called after that; it resets state of imported libraries that a new process would not have.
    """

    def become() -> int:
        os.setsid()
        begin()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.update(environment)
        name_process(name)
        reset()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return run_as_command(arguments)

    flush_output()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, handlers)  # a signal to the new process waits for its handlers
    try:
        pid = os.fork()
        if pid != 0:
            return pid
        _end_process(become)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _end_process(work: Callable[[], int]) -> NoReturn:
    """Work, and end this process with the exit code. Never return: the frames of the parent must not continue here."""
    code = 1
    try:
        code = work()
    except BaseException as error:  # noqa: BLE001  nothing above handles it
        code = report_error(error)
    finally:
        try:
            flush_output()
        finally:
            os._exit(code)


def run_as_command(arguments: list[str]) -> int:
    """Run `python -m megatron_rl ARGUMENTS` and the exit steps of the interpreter. Return the exit code."""
    sys.argv[1:] = arguments
    try:
        runpy.run_module("megatron_rl", run_name="__main__", alter_sys=True)
        code = 0
    except BaseException as error:  # noqa: BLE001  nothing above handles it
        code = report_error(error)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for the threads
    atexit._run_exitfuncs()
    return code


def report_error(error: BaseException) -> int:
    """Print the traceback of an error that nothing handled. Return the exit code."""
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
        return ExitCode.INTERRUPTED if isinstance(error, KeyboardInterrupt) else ExitCode.CRASH
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


def write_whole_lines() -> None:
    """Write every line of standard output and error with one system call.

    With PYTHONUNBUFFERED a line and its end are written apart, so that lines of several ranks mix.
    """
    for stream in (sys.__stdout__, sys.__stderr__):
        if isinstance(stream, io.TextIOWrapper):  # it is None in a process without a terminal
            stream.reconfigure(line_buffering=True, write_through=False)


def flush_output() -> None:
    """Write what standard output and error still hold."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # it may be None, gone or closed
            stream.flush()
