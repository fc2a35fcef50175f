"""Runs with code of the user's own: refused before they start, stopped by a reward that fails, resumed when mended."""

import pytest

from tests.e2e.command import assert_refused, records

REWARD = """\
from pathlib import Path

CALLS = Path(__file__).with_name("calls")


def f(response, tokens):
    CALLS.open("a").write(".")
    if len(CALLS.read_text()) > 200:
        raise RuntimeError("the judge is gone")
    return {"score": response == "2", "length": len(tokens)}
"""


def test_a_reward_that_fails_ends_the_run_with_a_checkpoint_and_the_run_goes_on_when_it_is_mended(
    cli, small_run, run_folder, tmp_path
):
    """128 responses a step: the reward fails in the second step, and no checkpoint was due before."""
    (tmp_path / "mine.py").write_text(REWARD)
    more = ["task.reward=mine.py:f", "run.save_every=0"]
    stopped = cli("train", small_run, *more)
    assert stopped.code == 2 and "Traceback" not in stopped.err, stopped.all
    message = f"UserError: task.reward f ({tmp_path}/mine.py:6) raised RuntimeError: the judge is gone"
    assert message in stopped.err and "for a response to prompt '" in stopped.err, stopped.all
    assert [r["step"] for r in records(run_folder)] == [0]
    assert (run_folder / "checkpoints" / "step_000001").is_dir()

    (tmp_path / "mine.py").write_text(REWARD.replace("len(CALLS.read_text()) > 200", "'-' in response"))
    refused = cli("train", small_run, *more, "--resume")
    assert_refused(refused, "ConfigError", f"{tmp_path}/mine.py has changed", "--accept-changed-code")
    done = cli("train", small_run, *more, "task.reward_on_error=zero", "--resume", "--accept-changed-code")
    assert done.code == 0, done.all
    steps = records(run_folder)
    assert [r["step"] for r in steps] == [0, 1]
    assert all(0 <= r["reward/length"] <= 2 and 0 <= r["reward/mean"] <= 1 for r in steps)
    assert "reward/errors" not in steps[0] and 0 < steps[1]["reward/errors"] < 128


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        (None, ["task.reward=mine.py:f"], ["task.reward: there is no file", "/mine.py"]),
        ("def f(response: 1\n", ["task.reward=mine.py:f"], ["importing", "mine.py:1 raised SyntaxError"]),
        ("def g(responze): ...\n", ["task.reward=mine.py:g"], ["g (", "mine.py:1)", "did you mean 'response'?"]),
        ("class Mine: ...\n", ["task.name=mine.py:Mine"], ["Mine (", "mine.py:1) has no method 'verify("]),
        ("class Mine: ...\n", ["task.name=mine.py:Mien"], ["has no 'Mien'; did you mean 'Mine'?"]),
        ("class Mine: ...\n", ["objective={name: 'mine.py:Mine'}"], ["Mine (", "mine.py:1) is no subclass of"]),
        ("", ["task.options={a: 1}"], ["task.options has a, but task.name: arithmetic declares no options"]),
        ("", ["--accept-changed-code"], ["pass it together with --resume"]),
    ],
)
def test_code_that_cannot_work_is_refused_before_anything_starts(
    refused, small_run, run_folder, tmp_path, text, overrides, words
):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    assert_refused(refused("train", small_run, *overrides), "ConfigError", *words)
    assert not run_folder.exists()
