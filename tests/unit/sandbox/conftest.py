"""Every way of making a jail that this machine has, and what must be true after every use of one."""

import time
from pathlib import Path

import psutil
import pytest

from megatron_rl.sandbox.runner import Sandbox
from megatron_rl.sandbox.select import probe

SECONDS = 10.0
HASTE = 0.5  # seconds, where the time is to run out
PATIENCE = 60.0  # of a test that waits for an end, on a machine with other work to do
FAULTS = {way: probe(way) for way in ("namespaces", "bwrap")}


@pytest.fixture(params=["namespaces", "bwrap"])
def sandbox(request):
    """One after another, every way of making a jail that this machine has."""
    if FAULTS[request.param]:
        pytest.skip(f"no jail by {request.param}: {FAULTS[request.param]}")
    return Sandbox(request.param, seconds=SECONDS, memory_mb=128, output_bytes=10_000)


@pytest.fixture
def hasty(sandbox):
    return Sandbox(sandbox.way, seconds=HASTE, memory_mb=128)


@pytest.fixture
def refused(sandbox):
    """Asserts that code is refused something by the system: it prints the error that `attempt` raised, and nothing else."""

    def refused(attempt: str, *errors: str) -> None:
        lines = "\n    ".join(attempt.splitlines())
        caught = "except OSError as error:\n    print(type(error).__name__)\nelse:\n    print('in')"
        code = f"import ctypes, os, socket\ntry:\n    {lines}\n{caught}"
        result = sandbox.run(code)
        assert result.ok, result
        assert result.output.strip() in errors, result

    return refused


def jail_processes() -> set[int]:
    """Processes of jails, by their program: runner, guard and launcher all show its command line."""
    found = set()
    for process in psutil.process_iter(["cmdline", "ppid"]):
        if any("code of a model, in a jail" in argument for argument in process.info["cmdline"] or ()):
            found.add(process.pid)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No process of a jail, and nothing mounted, outlives its test."""
    before = jail_processes()
    mounts = Path("/proc/self/mountinfo").read_text()
    yield
    deadline = time.monotonic() + PATIENCE
    while (left := jail_processes() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left
    assert Path("/proc/self/mountinfo").read_text() == mounts
