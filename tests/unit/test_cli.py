"""The command line lists its commands, and refuses bad input in one paragraph."""

import errno
import subprocess
import sys

import pytest

from megatron_rl import cli
from megatron_rl.errors import ConfigError, EngineError

COMMANDS = {"train", "eval", "serve", "report", "doctor", "config"}


def say(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Run a command line. Return exit code, stdout and stderr."""
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
    """`--help` takes half a second instead of several, because it does not import the trainer."""
    code = "import sys; from megatron_rl import cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_command_is_a_usage_error(monkeypatch, capsys):
    code, _, err = say(monkeypatch, capsys, "trian")
    assert code == 2 and "trian" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--model", "m", "--port", "80000"),
        ("serve", "--model", "m", "--port", "0"),
        ("serve", "--model", "m", "--threads", "-1"),
        ("serve", "--model", "m", "--max-rows", "0"),
        ("attribute", "runs/x", "--prompts", "0"),
        ("attribute", "runs/x", "--sampled-by", "-1"),
        ("warmup", "c.yaml", "--dest", "d", "--target", "1.5"),
        ("warmup", "c.yaml", "--dest", "d", "--error-rate", "-0.1"),
        ("warmup", "c.yaml", "--dest", "d", "--batch-size", "0"),
        ("warmup", "c.yaml", "--dest", "d", "--max-updates", "0"),
    ],
    ids=lambda arguments: " ".join(arguments[-2:]),
)
def test_a_number_out_of_its_range_is_a_usage_error(monkeypatch, capsys, arguments):
    code, out, err = say(monkeypatch, capsys, *arguments)
    words = " ".join(err.replace("│", " ").split())
    assert (code, out) == (
        2,
        "",
    ) and f"Invalid value for '{arguments[-2]}'" in words


def test_a_mistake_is_one_paragraph_and_exit_code_2(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("RANK", raising=False)
    code, out, err = say(monkeypatch, capsys, "train", str(tmp_path / "none.yaml"))
    assert (code, out, err) == (2, "", f"ConfigError: no configuration file at {tmp_path / 'none.yaml'}\n")


@pytest.mark.parametrize("arguments", [(), ("x.yaml", "--defaults")], ids=["neither", "both"])
def test_config_takes_a_file_or_defaults(monkeypatch, capsys, arguments):
    said = say(monkeypatch, capsys, "config", *arguments)
    assert said == (2, "", "ConfigError: give either a configuration file or --defaults\n")


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


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("no"), 2),
        (EngineError("no"), 75),
        (OSError(errno.ENOSPC, "full"), 75),
        (RuntimeError("gloo/gloo/transport/tcp/pair.cc"), 75),
        (KeyboardInterrupt(), 130),
    ],
    ids=repr,
)
def test_exit_codes_tell_what_may_go_away_from_a_mistake(monkeypatch, capsys, error, code):
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli, "load_config", refuse)
    assert say(monkeypatch, capsys, "train", "x.yaml")[0] == code


def test_resume_is_a_flag_and_resume_auto_another(monkeypatch, capsys):
    seen = []

    def load(path, overrides, **_: object) -> None:
        seen.append((str(path), overrides))
        raise ConfigError("stop")

    monkeypatch.setattr(cli, "load_config", load)
    for flag in ("--resume", "--resume=auto"):
        say(monkeypatch, capsys, "train", flag, "x.yaml", "run.steps=5")
    assert seen == [("x.yaml", ["run.steps=5"])] * 2
    assert say(monkeypatch, capsys, "train", "--resume=yes", "x.yaml")[0] == 2 and len(seen) == 2
