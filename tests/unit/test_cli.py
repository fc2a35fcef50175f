"""The command line itself: what it offers, how it says no, and how ranks of one machine end together."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_rl import cli
from megatron_rl.errors import ConfigError
from megatron_rl.launch import ranks as launch

COMMANDS = {"train", "eval", "serve", "report", "doctor"}


def say(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a call."""
    monkeypatch.setattr(sys, "argv", ["megatron-rl", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


def test_help_names_every_command(monkeypatch, capsys):
    code, out, _ = say(monkeypatch, capsys, "--help")
    assert code == 0 and all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(monkeypatch, capsys, command):
    code, out, _ = say(monkeypatch, capsys, command, "--help")
    assert code == 0 and "Usage" in out


def test_help_and_versions_do_not_load_torch():
    """Half a second instead of several: typing --help must not import the trainer."""
    code = "import sys; from megatron_rl import cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_command_is_a_usage_error(monkeypatch, capsys):
    code, _, err = say(monkeypatch, capsys, "trian")
    assert code == 2 and "trian" in err


def test_a_mistake_is_one_paragraph_and_exit_code_2(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("RANK", raising=False)
    code, out, err = say(monkeypatch, capsys, "train", str(tmp_path / "none.yaml"))
    assert (code, out, err) == (2, "", f"ConfigError: no configuration file at {tmp_path / 'none.yaml'}\n")


def test_an_error_that_all_ranks_share_is_said_by_the_first_alone(monkeypatch, capsys):
    def refuse(*_: object, **__: object) -> None:
        error = ConfigError("no")
        error.everywhere = True
        raise error

    monkeypatch.setattr(cli, "load_config", refuse)
    monkeypatch.setenv("RANK", "1")
    assert say(monkeypatch, capsys, "train", "x.yaml") == (2, "", "")
    monkeypatch.setenv("RANK", "0")
    assert say(monkeypatch, capsys, "train", "x.yaml") == (2, "", "ConfigError: no\n")


def test_an_error_of_one_rank_is_said_by_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "1")
    missing = tmp_path / "none.yaml"
    assert say(monkeypatch, capsys, "train", str(missing)) == (
        2,
        "",
        f"rank 1: ConfigError: no configuration file at {missing}\n",
    )


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "load_config", broken)
    monkeypatch.setattr(sys, "argv", ["megatron-rl", "train", "x.yaml"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize(("error", "code"), [(ConfigError("no"), 2), (KeyboardInterrupt(), 130)])
def test_exit_codes_tell_a_mistake_from_ctrl_c(monkeypatch, capsys, error, code):
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli, "load_config", refuse)
    assert say(monkeypatch, capsys, "train", "x.yaml")[0] == code


@pytest.fixture
def ranks(monkeypatch, tmp_path):
    """Ranks that run a small script in place of the trainer, found first on the path."""
    package = tmp_path / "megatron_rl"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def run(script: str, count: int, stops: tuple[tuple[float, int], ...] = ()) -> tuple[int, float]:
        for seconds, number in stops:
            threading.Timer(seconds, os.kill, (os.getpid(), number)).start()
        (package / "__main__.py").write_text("import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + script)
        started = time.monotonic()
        return launch.run_ranks(["train"], count), time.monotonic() - started

    return run


def test_ranks_are_told_who_they_are(ranks, tmp_path):
    script = (
        "open(f'rank{rank}', 'w').write(' '.join(os.environ[n] for n in ('LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')))"
    )
    assert ranks(script, 3)[0] == 0
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(3)] == [f"{rank} 3 127.0.0.1" for rank in range(3)]


def test_a_rank_that_fails_ends_the_others_and_gives_its_exit_code(ranks):
    code, seconds = ranks("if rank == 1: sys.exit(7)\ntime.sleep(100)", 3)
    assert code == 7 and seconds < 20


def test_a_rank_that_is_killed_gives_128_plus_the_signal(ranks):
    assert ranks("if rank == 0: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(100)", 2)[0] == 137


def test_others_have_time_to_say_why_they_end(ranks, tmp_path):
    script = "if rank == 0: sys.exit(3)\ntime.sleep(1)\nopen('why', 'w').write('because')\nsys.exit(4)"
    assert ranks(script, 2)[0] == 3
    assert (tmp_path / "why").read_text() == "because"


def test_helpers_of_a_killed_rank_are_ended_with_it(ranks, tmp_path):
    script = (
        "import subprocess\n"
        "helper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
        "open('helper', 'w').write(str(helper.pid))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert ranks(script, 1)[0] == 137
    stat = Path(f"/proc/{(tmp_path / 'helper').read_text()}/stat")
    deadline = time.monotonic() + 5
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the helper lives on"
        time.sleep(0.05)


PATIENT = (
    "signal.signal(signal.SIGINT, lambda *_: (open(f'asked{rank}', 'a').write('x'), time.sleep(0.5), sys.exit(130)))\n"
)
STUBBORN = "signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"


def test_ctrl_c_asks_the_first_rank_alone(ranks, tmp_path, capfd):
    code, seconds = ranks(PATIENT + "time.sleep(100)", 2, ((1.5, signal.SIGINT),))
    assert code == 130 and seconds < 30
    assert (tmp_path / "asked0").exists() and not (tmp_path / "asked1").exists()
    assert "again to stop at once" in capfd.readouterr().err


def test_a_terminal_that_closes_asks_for_a_stop_though_nothing_can_be_said_any_more(ranks, tmp_path, monkeypatch):
    class Gone:
        def write(self, _: str) -> None:
            raise OSError(5, "Input/output error")

        def flush(self) -> None: ...

    monkeypatch.setattr(launch.sys, "stderr", Gone())
    assert ranks(PATIENT + "time.sleep(100)", 1, ((1.5, signal.SIGHUP),))[0] == 130
    assert (tmp_path / "asked0").exists()


def test_one_request_that_arrives_twice_is_still_one(ranks, tmp_path):
    """`timeout` and schedulers signal a process and right after it the process group."""
    assert ranks(PATIENT + "time.sleep(100)", 1, ((1.5, signal.SIGTERM), (1.51, signal.SIGTERM)))[0] == 130
    assert (tmp_path / "asked0").read_text() == "x"


def test_a_second_ctrl_c_ends_at_once_what_does_not_stop(ranks):
    code, seconds = ranks(STUBBORN + "time.sleep(100)", 2, ((1.0, signal.SIGINT), (2.5, signal.SIGINT)))
    assert code == 130 and seconds < 15
