"""Runs work with real SGLang servers on CPU, from the command line to the log. They need `make sglang`."""

from pathlib import Path

import pytest

from tests.e2e.command import ROOT, Command, arguments_of, records
from tests.e2e.test_engines import assert_whole_steps, url_of

PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
SGLANG = ("rollout.engine=sglang", f"rollout.sglang.python={PYTHON}")
without_sglang = pytest.mark.skipif(not PYTHON.is_file(), reason="no .venv-sglang: make sglang")
pytestmark = without_sglang


def train(start, small_run, *more: str) -> str:
    """Run to the end and return stdout. `Command.wait` also fails if the run leaves a process behind."""
    command: Command = start("train", small_run, *SGLANG, *more)
    result = command.wait(timeout=400)
    assert result.code == 0, result.all
    return result.out


def test_five_strictly_on_policy_steps_with_weights_broadcast_to_sglang(start, small_run, run_folder):
    train(start, small_run, "parallel.tensor=2", "rollout.transport=distributed", "run.steps=5")
    found = records(run_folder)
    assert [r["step"] for r in found] == list(range(5))
    for record in found:
        # The first update of a step uses the weights that sampled: mu and pi differ only by arithmetic.
        assert abs(record["mismatch/ratio/min"] - 1) < 1e-4 and abs(record["mismatch/ratio/max"] - 1) < 1e-4
    assert max(abs(record["ratio/max"] - 1) for record in found) > 1e-3, (
        "the second update meets weights that have moved"
    )


def test_stale_rollouts_from_dequantized_fp8_weights_log_their_mismatch(start, small_run, run_folder):
    said = train(
        start,
        small_run,
        "parallel.tensor=2",
        "rollout.max_staleness=1",
        "precision.rollout=fp8_blockwise",
        "rollout.transport=distributed",
        "run.steps=5",
    )
    assert "dequantized" in said
    found = records(run_folder)
    assert [r["step"] for r in found] == list(range(5))
    assert [record["staleness/max"] for record in found] == [0, 1, 1, 1, 1]
    # The first step shows the effect of e4m3 and bf16 alone; the others also show a step of this learning rate.
    assert 1e-3 < abs(found[0]["mismatch/ratio/max"] - 1) < 0.5
    assert max(record["mismatch/stale_1/k3"] for record in found[1:]) > 10 * found[0]["mismatch/kl/k3"]
    assert all(record["mismatch/stale_1/tokens"] > 0 for record in found[1:])


def kill_one_of_two(command: Command, run_folder: Path) -> tuple[str, int]:
    """Kill one of two servers after two steps or more. Return its URL and the number of steps by then.

    The server's first process is killed, not the guard that started it.
    """
    command.until(lambda: len(records(run_folder)) >= 2, timeout=400)
    dead, _ = [p for p in command.members() if arguments_of(p)[1:3] == ["-m", "sglang.launch_server"]]
    url = url_of(dead)
    dead.kill()
    return url, len(records(run_folder))


def test_a_run_goes_on_without_an_sglang_server_that_was_killed(start, small_run, run_folder):
    steps = 10
    more = (f"run.steps={steps}", "rollout.servers=2", "rollout.transport=distributed", "run.save_every=0")
    command: Command = start("train", small_run, *SGLANG, *more)
    url, before = kill_one_of_two(command, run_folder)
    result = command.wait(timeout=400)
    assert result.code == 0, result.all
    assert before < steps - 1, "the server was killed too late to matter"
    assert_whole_steps(run_folder, steps)
    assert result.err.count(f"engine {url} is lost") == 1, result.err


def test_behind_a_router_a_run_goes_on_without_a_server_and_ends_clearly_without_the_router(
    start, small_run, run_folder
):
    more = (
        "run.steps=500",
        "rollout.servers=2",
        "rollout.sglang.router=true",
        "rollout.transport=tensor",
        "run.save_every=0",
    )
    command: Command = start("train", small_run, *SGLANG, *more)
    url, before = kill_one_of_two(command, run_folder)
    command.until(lambda: len(records(run_folder)) >= before + 3, timeout=400)
    for process in command.members():  # the guard: the router itself has another command line
        if "sglang_router.launch_router" in arguments_of(process):
            process.kill()
    result = command.wait(timeout=400)
    assert result.code == 75 and "Traceback" not in result.err, result.all
    assert result.err.count(f"engine {url} is lost") == 1, result.err
    assert "sglang-router at " in result.err.splitlines()[-1] and "router: false" in result.err.splitlines()[-1]
    assert_whole_steps(run_folder, len(records(run_folder)))
