"""Fixtures for every way to make a jail on this machine, and a check after every test that no jail is left."""

import time
from pathlib import Path

import psutil
import pytest

from megatron_rl.sandbox.runner import Sandbox
from megatron_rl.sandbox.select import probe

SECONDS = 10.0
HASTE = 0.5  # time limit in seconds for code that must run out of time
PATIENCE = 60.0  # seconds that a test waits for an end, on a busy machine
FAULTS = {way: probe(way) for way in ("namespaces", "bwrap")}


@pytest.fixture(params=["namespaces", "bwrap"])
def sandbox(request):
    """The tests run once for every way to make a jail on this machine."""
    if FAULTS[request.param]:
        pytest.skip(f"no jail by {request.param}: {FAULTS[request.param]}")
    return Sandbox(request.param, seconds=SECONDS, memory_mb=128, output_bytes=10_000)


@pytest.fixture
def hasty(sandbox):
    return Sandbox(sandbox.way, seconds=HASTE, memory_mb=128)


@pytest.fixture
def refused(sandbox):
    """The system refuses `attempt`: the code prints only the name of the error that it raised, which is in `errors`."""

    def refused(attempt: str, *errors: str) -> None:
        lines = "\n    ".join(attempt.splitlines())
        caught = "except OSError as error:\n    print(type(error).__name__)\nelse:\n    print('in')"
        code = f"import ctypes, os, socket\ntry:\n    {lines}\n{caught}"
        result = sandbox.run(code)
        assert result.ok, result
        assert result.output.strip() in errors, result

    return refused


def jail_processes() -> set[int]:
    """Return the ids of all processes of jails.

    Runner, guard and launcher all have the program of the jail in their command line.
    """
    found = set()
    for process in psutil.process_iter(["cmdline", "ppid"]):
        if any("code of a model, in a jail" in argument for argument in process.info["cmdline"] or ()):
            found.add(process.pid)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No process of a jail and no mount is left after a test."""
    before = jail_processes()
    mounts = Path("/proc/self/mountinfo").read_text()
    yield
    deadline = time.monotonic() + PATIENCE
    while (left := jail_processes() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left
    assert Path("/proc/self/mountinfo").read_text() == mounts
