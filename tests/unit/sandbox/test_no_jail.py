"""Without a jail, no code runs unless the user allows it."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_rl.errors import ConfigError
from megatron_rl.sandbox import select as jails
from megatron_rl.sandbox.runner import Sandbox
from megatron_rl.sandbox.seccomp import filter_program
from megatron_rl.sandbox.select import allow_unsafe, find_jail, probe
from tests.unit.sandbox.conftest import FAULTS, SECONDS


def test_the_probe_tells_what_code_reaches_where_there_is_no_jail():
    assert "files of this machine" in probe("unsafe") and "the trainer" in probe("unsafe")


def test_no_jail_is_an_error_that_says_why_and_what_to_do(monkeypatch):
    monkeypatch.setattr(jails, "probe", lambda way: f"{way} is broken")
    find_jail.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"bwrap: bwrap is broken.*install bubblewrap.*task\.sandbox=unsafe"):
            find_jail()
    finally:
        find_jail.cache_clear()


@pytest.mark.skipif(not shutil.which("unshare"), reason="no `unshare` to make a machine without namespaces with")
def test_where_namespaces_are_forbidden_the_jail_is_refused_with_the_reason():
    program = "from megatron_rl.sandbox.select import find_jail; find_jail()"
    forbid = f"echo 0 > /proc/sys/user/max_user_namespaces && exec {sys.executable} -c '{program}'"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", forbid]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "find_jail" not in answer.stderr:
        pytest.skip(f"this machine cannot be made into one without namespaces: {answer.stderr}")
    assert "namespaces: the sandbox failed (namespaces): unshare (new namespaces): " in answer.stderr
    assert "task.sandbox=unsafe" in answer.stderr


def test_a_machine_whose_calls_are_not_listed_has_no_filter_and_no_jail(monkeypatch):
    assert filter_program("sparc") is None
    assert len(filter_program("aarch64") or b"") % 8 == 0
    monkeypatch.setattr(jails, "filter_program", lambda: None)
    assert "no filter of system calls" in probe("namespaces")


def test_unsafe_is_warned_of_once_and_keeps_the_limits(caplog):
    allow_unsafe.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert allow_unsafe() == allow_unsafe() == "unsafe"
    assert [r.getMessage() for r in caplog.records] == [caplog.records[0].getMessage()] and "your rights" in caplog.text
    sandbox = Sandbox("unsafe", seconds=SECONDS, memory_mb=128, output_bytes=1000)
    seen = sandbox.run(
        "import os; open('x', 'w'); print(os.listdir('.'), os.getcwd(), dict(os.environ))"
    ).output.split()
    assert seen[0] == "['x']" and seen[2] == "{}" and not os.path.exists(seen[1])
    reasons = {
        "import time; time.sleep(1000)": "timeout",
        "x = bytearray(10 ** 9)": "memory",
        "while True: print('x' * 1000)": "output",
        "1 / 0": "error",
    }
    assert {code: sandbox.run(code).reason for code in reasons} == reasons


@pytest.mark.skipif(os.geteuid() != 0, reason="this user is not root, and all tests here are of its own jail")
def test_a_user_without_rights_has_a_jail_too(tmp_path):
    python = "/usr/bin/python3"
    new = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    if FAULTS["namespaces"] or not shutil.which(python) or subprocess.run(new, check=False).returncode:
        pytest.skip(f"no jail, or no {python} of version 3.11 that everybody may use")
    # The modules that make the jail need only these files. This user may not be able to read the rest of the package.
    for name in (
        "errors.py",
        "sandbox/select.py",
        "sandbox/runner.py",
        "sandbox/jail.py",
        "sandbox/seccomp.py",
        "sandbox/interpreter.py",
    ):
        copy = tmp_path / "megatron_rl" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(jails.__file__).parents[1] / name, copy)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.is_relative_to(tempfile.gettempdir()) and folder != Path(tempfile.gettempdir()):
            folder.chmod(0o755)
    program = """
from megatron_rl.sandbox.select import probe
from megatron_rl.sandbox.runner import Sandbox
print([probe("namespaces")], Sandbox("namespaces", seconds=5, memory_mb=64).run("print(6 * 7)").output)
"""
    answer = subprocess.run(
        [python, "-c", program],
        cwd=tmp_path,
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.stdout == "[''] 42\n\n", answer.stderr
