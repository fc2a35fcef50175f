"""How the ranks of one machine start, are told to stop, and end together: forked ones as new processes do."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from megatron_rl.errors import ConfigError
from megatron_rl.launch.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[3]
# A launcher whose ranks run a small script in place of the trainer. The script is `megatron_rl.__main__` for a fork,
# because the package looks there first, and for a new process, because PYTHONPATH does.
LAUNCHER = """
import os, sys
way, count, fake, root = sys.argv[1:]
sys.path.insert(0, root)
print("started")  # not flushed
import megatron_rl
from megatron_rl.launch import ranks
megatron_rl.__path__.insert(0, fake + "/megatron_rl")
os.environ["PYTHONPATH"] = fake
assert ranks.has_one_thread()
def like_new():
    print("forked", flush=True)
ranks.prepare_fork = lambda: like_new if way == "fork" else None
code = ranks.run_ranks(["train"], int(count))
print("launcher", code, flush=True)
sys.exit(code)
"""
SCRIPT = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
PATIENT = (
    "signal.signal(signal.SIGINT, lambda *_: (open(f'asked{rank}', 'a').write('x'), time.sleep(0.5), sys.exit(130)))\n"
    "open(f'ready{rank}', 'w').close()\n"
)
STUBBORN = (
    "signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "open(f'ready{rank}', 'w').close()\n"
)


@dataclass(frozen=True)
class Ended:
    """How a launcher ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Launched:
    """A launcher at work in `folder`."""

    process: subprocess.Popen[str]
    folder: Path

    def until(self, *names: str) -> None:
        """Wait until the ranks have written these files."""
        deadline = time.monotonic() + 30
        while not all((self.folder / name).exists() for name in names):
            assert self.process.poll() is None and time.monotonic() < deadline, names
            time.sleep(0.02)

    def end(self) -> Ended:
        out, err = self.process.communicate(timeout=60)
        return Ended(self.process.returncode, out, err)


@pytest.fixture(params=["exec", "fork"])
def launch(request, tmp_path) -> Iterator[Callable[..., Launched]]:
    """Starts ranks that run a script, both ways."""
    if request.param == "fork" and not sys.platform.startswith("linux"):
        pytest.skip("ranks are forked on Linux only")
    package = tmp_path / "fake" / "megatron_rl"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "launcher.py").write_text(LAUNCHER)
    started: list[subprocess.Popen[str]] = []

    def launch(script: str, count: int, before: tuple[str, ...] = ()) -> Launched:
        (package / "__main__.py").write_text(SCRIPT + script)
        launcher = [*before, sys.executable, tmp_path / "launcher" / "launcher.py"]
        process = subprocess.Popen(
            [*launcher, request.param, str(count), tmp_path / "fake", ROOT],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return Launched(process, tmp_path)

    yield launch
    for process in started:
        process.kill()
        process.wait()


def test_ranks_are_told_who_they_are(launch, tmp_path):
    names = "('LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'OMP_NUM_THREADS')"
    assert launch(f"open(f'rank{{rank}}', 'w').write(' '.join(os.environ[n] for n in {names}))", 3).end().code == 0
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(3)] == [
        f"{rank} 3 127.0.0.1 {os.environ.get('OMP_NUM_THREADS', '1')}" for rank in range(3)
    ]


def test_a_rank_is_a_command_of_its_own(launch, tmp_path):
    script = (
        "import atexit, threading\n"
        "atexit.register(lambda: open('exit', 'w').write('handled'))\n"
        "threading.Thread(target=lambda: (time.sleep(0.5), open('thread', 'w').write('done'))).start()\n"
        "handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]\n"
        "assert handlers == [signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL], handlers\n"
        "assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())\n"
        "assert __name__ == '__main__' and os.getsid(0) == os.getpgid(0) == os.getpid()\n"
        "print(sys.argv[1:], sys.modules['__main__'].__spec__.name)\n"
    )
    ended = launch(script, 1).end()
    assert ended.code == 0, ended
    said = [line for line in ended.out.splitlines() if line not in ("started", "forked", "launcher 0")]
    assert said == ["['train'] megatron_rl.__main__"]
    assert ended.err == ""
    assert (tmp_path / "thread").read_text() == "done" and (tmp_path / "exit").read_text() == "handled"


def test_a_forked_rank_has_a_name_of_its_own(launch):
    """Its command line is the launcher's."""
    ended = launch("print(open('/proc/self/comm').read().strip() if sys.platform == 'linux' else '')", 1).end()
    assert ("forked" in ended.out) == ("mrl-rank0" in ended.out), ended


def test_what_the_launcher_printed_is_printed_once(launch):
    ended = launch("os.write(1, b'rank\\n')", 2).end()
    assert [ended.out.count(line) for line in ("started\n", "rank\n", "launcher 0\n")] == [1, 2, 1]


def test_a_bug_in_a_rank_has_a_traceback_and_exit_code_1(launch):
    ended = launch("def broken():\n    1 / 0\nbroken()", 1).end()
    assert ended.code == 1
    assert ended.err.startswith("Traceback (most recent call last):\n") and ended.err.count("Traceback") == 1
    assert "in broken" in ended.err and ended.err.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize(("argument", "code", "said"), [("", 0, ""), ("3", 3, ""), ("'no'", 1, "no\n")])
def test_a_rank_ends_with_its_exit_code(launch, argument, code, said):
    ended = launch(f"sys.exit({argument})", 1).end()
    assert (ended.code, ended.err) == (code, said)


def test_a_rank_that_fails_ends_the_others_and_gives_its_exit_code(launch):
    started = time.monotonic()
    assert launch("if rank == 1: sys.exit(7)\ntime.sleep(100)", 3).end().code == 7
    assert time.monotonic() - started < 30


def test_a_rank_that_is_killed_gives_128_plus_the_signal(launch):
    assert launch("if rank == 0: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(100)", 2).end().code == 137


@pytest.mark.parametrize("name", ["SIGHUP", "SIGKILL", "SIGSEGV"])
def test_the_last_line_names_the_rank_that_died_and_the_signal(launch, name):
    script = f"if rank == 1: os.kill(os.getpid(), signal.{name})\ntime.sleep(1)\nsys.exit('rank 1 is gone')"
    ended = launch(script, 3).end()
    assert ended.code == 128 + getattr(signal, name)
    assert re.fullmatch(rf"rank 1 \(pid \d+\) was killed by {name}.*; go on with --resume", ended.err.splitlines()[-1])
    assert ended.err.count("rank 1 is gone") == 2


def test_the_last_line_names_the_rank_that_failed_first_unless_it_said_why(launch):
    script = "if rank == 1: sys.exit({})\ntime.sleep(1)\nsys.exit(4)"
    assert re.fullmatch(
        r"rank 1 \(pid \d+\) failed first, with exit code 7: .*\n", launch(script.format(7), 2).end().err
    )
    assert launch(script.format(2), 2).end().err == ""


def test_more_ranks_than_a_machine_has_are_refused():
    with pytest.raises(ConfigError, match="= 1000000 ranks; one machine has at most 1024"):
        run_ranks(["train"], 1_000_000)


def test_others_have_time_to_say_why_they_end(launch, tmp_path):
    script = "if rank == 0: sys.exit(3)\ntime.sleep(1)\nopen('why', 'w').write('because')\nsys.exit(4)"
    assert launch(script, 2).end().code == 3
    assert (tmp_path / "why").read_text() == "because"


HELPER = (
    "import subprocess\n"
    "helper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
    "open(f'pids{rank}', 'w').write(f'{os.getpid()} {helper.pid}')\n"
    "open(f'ready{rank}', 'w').close()\n"
)


def test_helpers_of_a_killed_rank_are_ended_with_it(launch, tmp_path):
    assert launch(HELPER + "os.kill(os.getpid(), signal.SIGKILL)\n", 1).end().code == 137
    assert_gone(tmp_path / "pids0")


def test_ranks_and_their_helpers_end_with_a_launcher_that_is_killed(launch, tmp_path):
    launched = launch(HELPER + "time.sleep(100)", 2)
    launched.until("ready0", "ready1")
    launched.process.kill()
    assert_gone(tmp_path / "pids0", tmp_path / "pids1")


def assert_gone(*files: Path) -> None:
    """The processes that are named in the files end soon."""
    pids = [int(pid) for file in files for pid in file.read_text().split()]
    deadline = time.monotonic() + 5
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < deadline, "a process lives on"
        time.sleep(0.05)


def test_ctrl_c_asks_the_first_rank_alone(launch, tmp_path):
    launched = launch(PATIENT + "time.sleep(100)", 2)
    launched.until("ready0", "ready1")
    os.killpg(launched.process.pid, signal.SIGINT)
    ended = launched.end()
    assert ended.code == 130, ended
    assert (tmp_path / "asked0").exists() and not (tmp_path / "asked1").exists()
    assert "again to stop at once" in ended.err


def test_a_terminal_that_closes_asks_for_a_stop_though_nothing_can_be_said_any_more(launch, tmp_path):
    launched = launch(PATIENT + "time.sleep(100)", 1)
    launched.until("ready0")
    assert launched.process.stderr is not None
    launched.process.stderr.close()
    launched.process.send_signal(signal.SIGHUP)
    assert launched.process.wait(30) == 130
    assert (tmp_path / "asked0").exists()


def test_a_run_under_nohup_outlives_its_terminal(launch, tmp_path):
    launched = launch(
        PATIENT + "assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN\ntime.sleep(2)", 1, ("nohup",)
    )
    launched.until("ready0")
    launched.process.send_signal(signal.SIGHUP)
    assert launched.end().code == 0


def test_one_request_that_arrives_twice_is_still_one(launch, tmp_path):
    """`timeout` and schedulers signal a process and right after it the process group."""
    launched = launch(PATIENT + "time.sleep(100)", 1)
    launched.until("ready0")
    launched.process.send_signal(signal.SIGTERM)
    time.sleep(0.01)
    os.killpg(launched.process.pid, signal.SIGTERM)
    assert launched.end().code == 130
    assert (tmp_path / "asked0").read_text() == "x"


def test_a_second_ctrl_c_ends_at_once_what_does_not_stop(launch):
    launched = launch(STUBBORN + "time.sleep(100)", 2)
    launched.until("ready0", "ready1")
    launched.process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    launched.process.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert launched.end().code == 130 and time.monotonic() - started < 15
