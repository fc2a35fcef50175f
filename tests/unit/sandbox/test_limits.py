"""Code in the jail ends in time, stays within its limits, and leaves nothing behind."""

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from megatron_rl.sandbox import runner as sandbox_module
from megatron_rl.sandbox.runner import FILE_BYTES, MOST_CODE, PROCESSES
from tests.unit.sandbox.conftest import FAULTS, HASTE, PATIENCE, SECONDS, jail_processes


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(1000)",
        "import signal, time\n[signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15, 24)]\nwhile True: time.sleep(1)",
        "import os, time\nos.closerange(0, 64)\ntime.sleep(1000)",
        "import os, signal, time\nwhile True: os.kill(os.getppid(), signal.SIGCHLD); time.sleep(0.01)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
        "import threading\n[threading.Thread(target=lambda: any(iter(int, 1))).start() for _ in range(4)]",
        "10 ** 10 ** 10",
        "import re; re.match('(a+)+$', 'a' * 40 + 'b')",
    ],
    ids=["loop", "sleep", "deaf", "closed", "false alarm", "stopped", "threads", "number", "regex"],
)
def test_code_that_does_not_end_is_ended_in_time(hasty, code):
    started = time.monotonic()
    result = hasty.run(code)
    assert (result.ok, result.reason) == (False, "timeout")
    assert HASTE * 0.9 < result.seconds < HASTE + 3
    assert time.monotonic() - started < PATIENCE


def test_memory_is_bounded(sandbox):
    for code in ("x = bytearray(10 ** 9)", "x = []\nwhile True: x.append('y' * 100_000)"):
        result = sandbox.run(code)
        assert (result.ok, result.reason) == (False, "memory"), result
    assert sandbox.run("x = bytearray(100 * 2 ** 20); print(len(x))").ok


@pytest.mark.parametrize(
    "call",
    ["os.memfd_create('x')", "m = ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600)\nif m < 0: raise PermissionError"],
)
def test_memory_that_no_limit_counts_is_not_to_be_had(refused, call):
    refused(call, "PermissionError")


def test_output_is_cut_while_it_is_read_and_ends_the_code(sandbox):
    before = psutil.Process().memory_info().rss
    result = sandbox.run("while True: print('x' * 10_000_000)")
    assert (result.ok, result.reason, len(result.output)) == (False, "output", 10_000)
    assert result.seconds < SECONDS
    assert psutil.Process().memory_info().rss - before < 100 << 20


def test_output_at_the_bound_is_whole(sandbox):
    result = sandbox.run("print('x' * 9_999)")
    assert (result.ok, len(result.output)) == (True, 10_000)


def test_files_are_bounded_one_by_one_and_together(sandbox):
    code = f"""
def fill(name, size):
    try:
        with open(name, "wb") as f:
            for _ in range(size // 1_000_000):
                f.write(bytes(1_000_000))
    except OSError as error:
        print(error.strerror)
fill("one", {2 * FILE_BYTES})
import os
os.remove("one")
for number in range(4):
    fill(str(number), {FILE_BYTES} * 3 // 4)
"""
    lines = sandbox.run(code).output.splitlines()
    assert lines[0] in ("File too large", "No space left on device")
    assert set(lines[1:]) == {"No space left on device"}


def test_a_huge_block_is_a_failure_of_the_block_and_is_sent_in_linear_time(sandbox):
    started = time.monotonic()
    result = sandbox.run("#" * (MOST_CODE + 1))
    assert (result.ok, result.reason) == (False, "error") and "at most 16777216" in result.output
    assert time.monotonic() - started < 1
    largest = sandbox.run("#" * (MOST_CODE - 20) + "\nprint('read')")
    assert largest.output == "read\n" or largest.reason == "memory", largest


def test_a_fork_bomb_makes_no_process(sandbox):
    started = time.monotonic()
    result = sandbox.run("import os\nwhile True:\n    os.fork()")
    assert (result.ok, result.reason) == (False, "error") and "PermissionError" in result.output
    clone = {"x86_64": 56, "aarch64": 220}[platform.machine()]
    calls = f"libc.fork(), libc.vfork(), libc.syscall({clone}, 17, 0, 0, 0, 0), libc.syscall(435, 0, 0)"
    code = f"import ctypes\nlibc = ctypes.CDLL(None)\nprint({calls})"
    assert sandbox.run(code).output == "-1 -1 -1 -1\n"
    assert time.monotonic() - started < PATIENCE


def test_a_thread_bomb_is_bounded(sandbox):
    code = """
import threading, time
threading.stack_size(65536)
count = 0
try:
    while True:
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
        count += 1
except RuntimeError:
    print(count)
"""
    result = sandbox.run(code)
    assert result.ok, result
    assert int(result.output) < (PROCESSES if sandbox.way == "namespaces" or os.geteuid() else 5000)


def test_no_daemon_survives_and_no_other_program_is_started(sandbox, refused):
    refused("os.execv('/proc/self/exe', ['x'])", "PermissionError")
    refused("import subprocess; subprocess.run(['true'])", "PermissionError")
    daemon = (
        "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        import time; time.sleep(600)"
    )
    assert "PermissionError" in sandbox.run(daemon).output


def test_an_end_of_the_trainer_is_the_end_of_its_jails(tmp_path):
    if FAULTS["namespaces"]:
        pytest.skip(f"no jail: {FAULTS['namespaces']}")
    before = jail_processes()
    program = (
        "from megatron_rl.sandbox.runner import Sandbox; "
        "Sandbox('namespaces', seconds=60, memory_mb=64).run('while True: pass')"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    )
    deadline = time.monotonic() + PATIENCE * 2
    while len(jail_processes() - before) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(jail_processes() - before) >= 3, "launcher, guard and runner"
    trainer.kill()
    trainer.wait()
    while (left := jail_processes() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def guard_of_a_runner() -> psutil.Process | None:
    """Return the guard of the only jail of this process, once the code runs and has a second thread, else None."""
    for launcher in psutil.Process().children():
        try:
            for guard in launcher.children():
                if any(runner.num_threads() > 1 for runner in guard.children()):
                    return guard
        except psutil.NoSuchProcess:
            continue
    return None


@pytest.mark.parametrize(("end", "seconds", "reason"), [(signal.SIGKILL, 300, "error"), (signal.SIGSTOP, 3, "timeout")])
def test_a_jail_that_fails_under_its_code_is_a_failure_of_the_code_and_not_of_the_run(
    sandbox, monkeypatch, end, seconds, reason
):
    monkeypatch.setattr(sandbox_module, "_START_S", 4.0)
    sandbox.seconds = seconds
    code = "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start(); time.sleep(60)"
    found = []
    thread = threading.Thread(target=lambda: found.append(sandbox.run(code)))
    thread.start()
    deadline, guard = time.monotonic() + PATIENCE, None
    while guard is None and time.monotonic() < deadline:
        guard = guard_of_a_runner()
    assert guard is not None
    guard.send_signal(end)
    thread.join(PATIENCE)
    assert [(result.ok, result.reason) for result in found] == [(False, reason)]
