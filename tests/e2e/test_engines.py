"""A run continues without lost engines while one engine lives. Engines of another process keep running."""

import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from megatron_rl.config import make_config
from megatron_rl.engines.pool import EnginePool
from megatron_rl.engines.processes.embedded import EmbeddedServers
from megatron_rl.errors import EngineError
from megatron_rl.policy import parallel
from megatron_rl.policy.device_port import pick_device
from megatron_rl.weight_sync.publish import publish_weights
from tests.disk_sync import disk_sync
from tests.e2e.command import Command, assert_drawn_once, records
from tests.e2e.conftest import version_of
from tests.e2e.test_resume import untimed
from tests.policies import build_planned_policy, embedded_plan

TRAJECTORIES = 8 * 16


def url_of(server: psutil.Process) -> str:
    """Return the URL of a server, from its name if it is forked, else from its command line."""
    if server.name().startswith("mrl-serve-"):
        return f"http://127.0.0.1:{server.name().rpartition('-')[2]}"
    arguments = server.cmdline()
    return f"http://127.0.0.1:{arguments[arguments.index('--port') + 1]}"


def assert_whole_steps(run, steps: int) -> None:
    """Check that each step was trained once, on all of its trajectories."""
    found = records(run)
    assert [r["step"] for r in found] == list(range(steps))
    for record in found:
        assert round(record["tokens/response"] / record["response_length/mean"]) == TRAJECTORIES
        rewarded = record["reward/mean"] * TRAJECTORIES
        assert abs(rewarded - round(rewarded)) < 1e-3
    assert_drawn_once(run)


def test_a_run_goes_on_without_a_server_that_was_killed(start, small_run, run_folder):
    steps = 15
    command: Command = start("train", small_run, f"run.steps={steps}", "rollout.servers=2", "run.save_every=0")
    command.until(lambda: len(records(run_folder)) >= 2)
    dead = command.servers()[0]
    url = url_of(dead)
    dead.kill()
    before = len(records(run_folder))
    result = command.wait()
    assert result.code == 0, result.all
    assert before < steps - 1, "the server was killed too late to matter"
    assert_whole_steps(run_folder, steps)
    assert result.err.count(f"engine {url} is lost") == 1, result.err


def test_a_server_that_was_killed_comes_back_and_a_deterministic_run_does_not_show_it(
    start, cli, small_run, run_folder, tmp_path
):
    """The new server starts from the model folder. It samples only after an update has given it the run's weights."""
    fixed = ["run.steps=20", "rollout.servers=2", "run.save_every=0", "rollout.deterministic=true"]
    straight = cli("train", small_run, *fixed)
    assert straight.code == 0, straight.all
    shutil.move(run_folder, tmp_path / "straight")
    command: Command = start("train", small_run, *fixed)
    command.until(lambda: len(records(run_folder)) >= 2)
    dead, kept = command.servers()
    dead.kill()
    new = command.until(lambda: next((s for s in command.servers() if s.pid not in (dead.pid, kept.pid)), None))
    place = url_of(new)
    key = (run_folder / "servers" / "api-key").read_text().strip()
    command.until(lambda: version_of(place, key) > "0")
    kept.kill()  # from now on the new server is the only one, so it samples
    known = len(records(run_folder))
    result = command.wait()
    assert result.code == 0, result.all
    assert known < 19, "the server came back too late to matter"
    assert "is started again (1 of 3): it ended with code -9" in result.err
    assert f"engine {place} is awaited at the next weight update" in result.err
    assert [untimed(r) for r in records(run_folder)] == [untimed(r) for r in records(tmp_path / "straight")]
    ours, theirs = ((run / "hf" / "model.safetensors").read_bytes() for run in (run_folder, tmp_path / "straight"))
    assert ours == theirs


class FatalPool(EnginePool):
    """A real pool that kills a server in `doomed` just before the server's next weight update."""

    doomed: ClassVar[dict[str, psutil.Process]] = {}

    def update_weights_from_disk(self, url: str, folder: Path, version: int) -> None:
        """Kill the server first if it is in `doomed`."""
        if url in self.doomed:
            self.doomed.pop(url).kill()
        super().update_weights_from_disk(url, folder, version)


def test_a_server_that_dies_inside_a_weight_update_costs_only_itself(arithmetic_model, tmp_path, capsys):
    config = make_config({"model": {"path": str(arithmetic_model)}, "run": {"dir": str(tmp_path)}})
    mesh = parallel.initialize(config.parallel, pick_device("cpu"), seed=0)
    policy = build_planned_policy(config, mesh)
    precision = embedded_plan(config.precision, policy.shape.num_layers)
    with (
        EmbeddedServers(arithmetic_model, tmp_path, count=2, threads=1) as servers,
        FatalPool(servers.urls, 60) as pool,
    ):
        sync = disk_sync(pool, policy.source, tmp_path / "staging", group=mesh.control)
        publish_weights(policy, sync, precision, 1)
        FatalPool.doomed[servers.urls[0]] = psutil.Process(servers.pids[0])
        publish_weights(policy, sync, precision, 2)
        assert pool.live_urls == servers.urls[1:]
        assert pool.weight_version(servers.urls[1]) == "2"
        assert "repeated with 1 of 2 engines" in capsys.readouterr().out
        FatalPool.doomed[servers.urls[1]] = psutil.Process(servers.pids[1])
        with pytest.raises(EngineError, match="no engine is left") as ended:
            publish_weights(policy, sync, precision, 3)
        assert all(url in str(ended.value) for url in servers.urls), "also the one that was lost before"


def test_a_run_without_any_server_left_ends_with_one_clear_error(start, small_run, run_folder):
    command: Command = start(
        "train", small_run, "run.steps=500", "rollout.servers=2", "parallel.tensor=2", "run.save_every=0"
    )
    command.until(lambda: len(records(run_folder)) >= 2)
    servers = command.servers()
    urls = [url_of(server) for server in servers]
    while command.process.poll() is None:  # also those that are started again
        for server in command.servers():
            with suppress(psutil.NoSuchProcess):
                server.kill()
        time.sleep(0.05)
    result = command.wait(timeout=60)
    assert result.code == 75, result.all
    assert "Traceback" not in result.err
    errors = [line for line in result.err.splitlines() if line.startswith("EngineError: ")]
    assert len(errors) == 1 and result.err.rstrip().endswith(errors[0])
    assert len(urls) == 2 and "no engine" in errors[0]


def test_servers_given_by_url_are_used_and_left_running(finished_run):
    assert finished_run.versions == ("default", str(1 + finished_run.steps))
    assert finished_run.server_lives
    assert not (finished_run.folder / "servers").exists(), "a server of our own was started"
    assert_whole_steps(finished_run.folder, finished_run.steps)
