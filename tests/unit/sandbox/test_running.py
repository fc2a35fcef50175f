"""A sandbox runs a block of Python and returns its output."""

import re
import threading
from dataclasses import replace

import pytest

from megatron_rl.errors import ConfigError
from megatron_rl.sandbox import runner as sandbox_module
from megatron_rl.sandbox.interpreter import interpreter
from megatron_rl.sandbox.select import probe
from tests.unit.sandbox.conftest import PATIENCE, SECONDS


def test_code_is_run_and_what_it_writes_comes_back(sandbox):
    result = sandbox.run("import sys\nprint(sum(range(101)))\nprint('Ω', file=sys.stderr)")
    assert (result.output, result.ok, result.reason) == ("5050\nΩ\n", True, "")
    assert 0 < result.seconds < SECONDS


def test_the_standard_library_is_there_and_other_packages_are_not(sandbox):
    names = "decimal fractions hashlib itertools json math random re sqlite3 statistics zlib asyncio"
    result = sandbox.run(f"import {names.replace(' ', ', ')}\nprint(math.factorial(20))")
    assert result.output == "2432902008176640000\n", result
    assert "No module named 'numpy'" in sandbox.run("import numpy").output


def test_an_exception_is_an_error_with_its_traceback(sandbox):
    result = sandbox.run("def f(x):\n    return 1 / x\nf(0)")
    assert (result.ok, result.reason) == (False, "error")
    assert re.fullmatch(
        r'Traceback .*\n  File "code.py", line 3, in <module>\n    f\(0\)\n.*line 2, in f\n.*ZeroDivisionError: .*\n',
        result.output,
        re.DOTALL,
    )


@pytest.mark.parametrize(
    ("code", "ok"),
    [("import sys; sys.exit(0)", True), ("import sys; sys.exit(4)", False), ("import os; os._exit(1)", False)],
)
def test_the_exit_status_decides(sandbox, code, ok):
    assert sandbox.run(code).ok is ok


@pytest.mark.parametrize(
    "code", ["def f(:\n", "print('\0')", "import os; os.kill(os.getpid(), 11)", "def f(): f()\nf()"]
)
def test_code_that_cannot_run_or_crashes_is_an_error(sandbox, code):
    result = sandbox.run(code)
    assert (result.ok, result.reason) == (False, "error")


def test_the_same_code_gives_the_same_output(sandbox):
    outputs = {sandbox.run("print({'a', 'b', 'c', 'd', 'e', 'f'}, hash('x'))").output for _ in range(3)}
    assert len(outputs) == 1 and "{" in outputs.pop()


def test_code_longer_than_a_pipe_is_run_whole(sandbox):
    assert sandbox.run(f"x = '{'y' * 300_000}'\nprint(len(x))").output == "300000\n"


def test_nothing_stays_from_one_block_to_the_next(sandbox):
    assert sandbox.run("open('note', 'w').write('x')\nprint(open('note').read())").output == "x\n"
    assert sandbox.run("import os; print(os.listdir('.'), os.getcwd())").output == "[] /work\n"


def test_threads_may_share_a_sandbox(sandbox):
    results = {}

    def work(number: int) -> None:
        results[number] = sandbox.run(f"print({number} ** 2)").output

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert results == {n: f"{n * n}\n" for n in range(6)}


def test_code_may_have_threads_of_its_own(sandbox):
    code = (
        "import threading\nfor n in range(2):\n"
        "    t = threading.Thread(target=print, args=(n,))\n    t.start()\n    t.join()"
    )
    assert sandbox.run(code).output == "0\n1\n"


@pytest.fixture
def fail_next(monkeypatch):
    """The next `count` jails do not start."""

    def fail_next(count: int) -> None:
        pythons = [replace(interpreter(), path="/bin/false") for _ in range(count)]
        monkeypatch.setattr(sandbox_module, "interpreter", lambda: pythons.pop() if pythons else interpreter())

    return fail_next


def test_a_jail_that_fails_once_is_tried_again_with_a_warning_and_one_that_fails_twice_is_an_error(
    sandbox, fail_next, caplog
):
    fail_next(1)
    assert sandbox.run("print(6 * 7)").output == "42\n"
    assert f"the sandbox failed ({sandbox.way})" in caplog.text
    fail_next(2)
    with pytest.raises(ConfigError, match="the sandbox failed"):
        sandbox.run("print(6 * 7)")


def test_a_jail_is_trusted_only_if_it_holds_at_once(sandbox, fail_next):
    fail_next(1)
    assert "the sandbox failed" in probe(sandbox.way)
