"""Ranks under srun: one rank a task, from Slurm's variables, or a refusal in words."""

import subprocess
import sys

import pytest

from megatron_rl.errors import ConfigError
from megatron_rl.launch.slurm_env import interface_towards, join_slurm_step, slurm_rank

TASK = {
    "SLURM_JOB_ID": "70",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "7",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
}


def test_a_task_is_a_rank() -> None:
    found = slurm_rank(TASK)
    assert found == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "7",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "node03",
        "MASTER_PORT": found["MASTER_PORT"],
    }
    assert 20000 <= int(found["MASTER_PORT"]) < 32768


def test_all_tasks_of_a_step_meet_at_one_port_and_steps_at_different_ones() -> None:
    def port(step: str, task: str) -> str:
        return slurm_rank(TASK | {"SLURM_STEP_ID": step, "SLURM_PROCID": task})["MASTER_PORT"]

    assert port("2", "0") == port("2", "6") != port("3", "0")


def test_the_master_that_a_launcher_has_chosen_stays() -> None:
    found = slurm_rank(TASK | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "21000", "WORLD_SIZE": "99"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"], found["WORLD_SIZE"]) == ("10.0.0.1", "21000", "7")


@pytest.mark.parametrize(
    "environment",
    [{}, TASK | {"RANK": "0"}, TASK | {"SLURM_NTASKS": "1"}, {k: v for k, v in TASK.items() if k != "SLURM_STEP_ID"}],
    ids=["no Slurm", "RANK is set", "one task", "batch script"],
)
def test_other_processes_are_no_ranks_of_slurm(environment: dict[str, str]) -> None:
    assert slurm_rank(environment) == {}


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST"])
def test_a_missing_variable_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"7 tasks, but {name} is not set: .*--export=ALL"):
        slurm_rank({key: value for key, value in TASK.items() if key != name})


@pytest.mark.parametrize(
    "broken",
    [{"SLURM_PROCID": "x"}, {"SLURM_STEP_NODELIST": "n[1"}, {"SLURM_STEP_TASKS_PER_NODE": "?"}, {"SLURM_NODEID": "2"}],
    ids=lambda broken: next(iter(broken)),
)
def test_an_unreadable_variable_is_refused(broken: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        slurm_rank(TASK | broken)


def test_joining_sets_the_variables_of_a_rank() -> None:
    environment = TASK | {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "7", "SLURM_NODEID": "0"}
    assert join_slurm_step(environment) and environment["RANK"] == "5"
    assert "GLOO_SOCKET_IFNAME" not in environment
    assert not join_slurm_step({"RANK": "0"})


def test_the_interface_towards_this_machine_is_loopback_and_nowhere_is_none() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no-such-host.invalid") is None


def test_tasks_of_srun_do_not_each_start_all_ranks() -> None:
    code = "from megatron_rl.launch.ranks import under_launcher; import os; print(under_launcher(), os.environ['RANK'])"
    step = TASK | {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "7", "SLURM_NODEID": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=step, capture_output=True, text=True, check=False)
    assert done.stdout == "True 5\n", done.stderr
