"""A trainer that is killed inside a weight update leaves engines that the resumed run brings back, and loses nothing."""

import httpx
import pytest

from megatron_rl.rollout.processes import free_port
from tests.e2e.command import records
from tests.e2e.conftest import version_of

STEPS = 6


def is_paused(url: str) -> bool:
    return bool(httpx.get(f"{url}/model_info", trust_env=False, timeout=30).json()["paused"])


@pytest.mark.parametrize("transport", ["disk", "distributed", "tensor"])
def test_a_trainer_killed_inside_a_weight_update(transport, start, cli, small_run, run_folder, arithmetic_model):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = start("serve", "--model", str(arithmetic_model), "--port", str(port), "--threads", "1")
    server.until(lambda: version_of(url))
    arguments = ["train", small_run, f"run.steps={STEPS}", f"rollout.urls=[{url}]", f"rollout.transport={transport}"]
    command = start(*arguments)
    command.until(lambda: len(records(run_folder)) >= 2 and is_paused(url))
    command.process.kill()
    command.process.wait(10)
    result = cli(*arguments, "--resume")
    assert result.code == 0, result.all
    assert [r["step"] for r in records(run_folder)] == list(range(STEPS)), "every step once"
    assert version_of(url) == str(STEPS + 1) and not is_paused(url)
    # What the engine samples from is what the trainer holds: the first update of every step says so.
    assert all(abs(r["mismatch/ratio/max"] - 1) < 1e-4 for r in records(run_folder))
    server.interrupt()
    server.wait()
    command.until_gone(command.members)  # torch's manager of shared memory lives as long as an engine that has used it
