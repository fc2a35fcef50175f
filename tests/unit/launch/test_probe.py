"""Preflight on this machine, with real facts: an honest node is not refused, and every planted fault is named."""

import fcntl
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.launch.conductor.probe import Problem, collect, find_problems

HOST = socket.gethostname()


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the conductor asks of this machine, which is sound."""
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "nonce").write_text("secret")
    hosts = {"run": str(tmp_path), "scratch": str(tmp_path), "hosts": [HOST], "ports": {}}
    return hosts | {"versions_command": []}


def judge(spec: dict[str, Any], more: list[dict[str, Any]] | None = None, **limits: Any) -> list[Problem]:
    """Return what is wrong with this machine, and with machines whose facts are given."""
    before = time.time()
    facts = [collect(spec), *(more or [])]
    known = {"hosts": [one["host"] for one in facts], "nonce": "secret", "before": before, "after": time.time()}
    known |= {"gpus": {}, "min_shm_gb": 0, "min_free_gb": 0, "written": known["hosts"]}
    return find_problems(facts, known | {"run": spec["run"], "scratch": spec["scratch"]} | limits)


def refusals(problems: list[Problem]) -> list[str]:
    return [one.text for one in problems if one.refused]


def test_a_sound_machine_is_not_refused(spec):
    assert refusals(judge(spec)) == []


@pytest.mark.parametrize("ahead", [-1, 1])
@pytest.mark.parametrize(("skew", "refused"), [(3, False), (8, True)])
def test_a_clock_that_differs(spec, ahead, skew, refused):
    """The conductor's clock is the one that is moved."""
    now = time.time() + ahead * skew
    (found,) = [one for one in judge(spec, before=now, after=now) if "clock" in one.text]
    assert found.node == HOST and found.refused is refused and f"differs by {skew}." in f"{found.text}."


def test_fewer_gpus_than_a_role_needs(spec, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert "it has 3 usable GPUs, 4 are required" in refusals(judge(spec, gpus={HOST: 4}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "it has 0 usable GPUs, 1 are required" in refusals(judge(spec, gpus={HOST: 1}))


def test_a_port_that_is_in_use(spec):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert refusals(judge(spec | {"ports": {HOST: [port]}})) == [f"ports {port} are in use"]


def test_names_that_lead_nowhere_or_back_to_the_machine(spec):
    found = refusals(judge(spec | {"hosts": [HOST, "localhost", "no-such-host.invalid"]}))
    assert "it cannot resolve no-such-host.invalid" in found
    assert any("it takes localhost for itself" in text for text in found)


def test_a_run_folder_that_is_not_the_conductors(spec):
    """The node reads its own folder of that name: another nonce, or its file never reaches the conductor."""
    not_shared = [f"the run folder {spec['run']} is not shared with it"]
    assert refusals(judge(spec, nonce="of another folder")) == not_shared
    assert refusals(judge(spec, written=[])) == not_shared


def test_a_run_folder_whose_files_cannot_be_locked(spec):
    """Here another process holds the lock; a file system without flock gives an error in the same place."""
    with open(Path(spec["run"]) / "control" / "probe.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (found,) = [one for one in judge(spec) if "locked" in one.text]
    assert not found.refused and not any("locked" in one.text for one in judge(spec))


def test_folders_that_are_missing_or_full(spec):
    assert f"{spec['run']}/none does not exist there or cannot be written" in refusals(
        judge(spec | {"scratch": f"{spec['run']}/none"})
    )
    assert any("GB free, 1e+09 are required" in text for text in refusals(judge(spec, min_shm_gb=1e9)))


def test_versions_that_differ_between_nodes(spec, tmp_path, monkeypatch):
    """Other nodes are this machine with another package first on its path."""
    monkeypatch.chdir(tmp_path)  # `python -c` looks into its folder first
    other = tmp_path / "other"
    (other / "megatron_rl").mkdir(parents=True)
    (other / "megatron_rl" / "__init__.py").write_text("changed = True\n")
    started = time.time()
    ours = spec | {"versions_command": [sys.executable]}
    others = [collect(ours) | {"host": "b", "loopback": []}]
    command = ["env", f"PYTHONPATH={other}", sys.executable]
    others.append(collect(spec | {"versions_command": command}) | {"host": "c", "loopback": []})
    found = [one for one in judge(ours, others, before=started) if one.refused]
    assert [one.node for one in found] == ["c"], found
    assert found[0].text.startswith("its megatron_rl differs from that of most nodes")


def test_a_python_that_does_not_run(spec):
    (text,) = refusals(judge(spec | {"versions_command": ["/no/such/python"]}))
    assert text.startswith("its Python does not run (") and "/no/such/python" in text


def test_a_machine_that_allows_few_files_is_warned_of(spec):
    started = time.time()
    few = collect(spec) | {"host": "few", "open_files": 1024, "loopback": []}
    warning = Problem("few", "it allows 1024 open files; large runs need 4096", False)
    assert warning in judge(spec, [few], before=started)


def test_a_machine_that_does_not_reply(spec):
    (found,) = [one for one in judge(spec, hosts=[HOST, "silent"]) if one.refused]
    assert found.node == "silent" and "did not reply" in found.text
    assert os.path.exists(Path(spec["run"]) / "control" / f"probe-{HOST}")
