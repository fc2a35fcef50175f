"""Jobs on a virtual cluster of four nodes: placement, failures, requeues. The roles are stand-ins that obey files."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import yaml

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.launch.conductor.nodelist import expand_hosts
from megatron_rl.launch.conductor.port_block import pick_block
from megatron_rl.launch.preflight_job import run_preflight
from megatron_rl.launch.status import attach_command, cancel_run, read_status, status_lines
from megatron_rl.study.cell_status import read_states
from megatron_rl.study.run_study import StudyRequest, run_study
from megatron_rl.study.study_folder import StudyFolder
from tests.slurm.conftest import ROOT
from tests.slurm.virtual_cluster import HERE, FakeRun, wait_for

pytestmark = pytest.mark.slurm
ENDLESS = 100_000  # steps; Slurm may take a minute to see a dead node, and no run may be done before that
FOUR_NODES = ["parallel.tensor=2", "rollout.servers=2"]


def first_lines(fake_run: FakeRun, pattern: str) -> list[str]:
    return [path.read_text().splitlines()[0] for path in sorted((fake_run.run / "logs" / "latest").glob(pattern))]


@pytest.fixture(scope="module")
def batch(cluster, model, tmp_path_factory):
    """Runs on two or three nodes, submitted together because each waits for Slurm most of the time."""
    names = ("asked", "cancelled", "short", "engine", "rank", "stuck", "mistake", "next", "never")
    runs = {name: FakeRun(cluster, tmp_path_factory.mktemp("batch") / "runs", model) for name in names}
    runs["asked"].wish(steps=ENDLESS)
    runs["cancelled"].wish(steps=ENDLESS)
    runs["short"].wish(steps=ENDLESS)
    runs["engine"].wish(steps=12, die_engine_0_1="7")
    runs["rank"].wish(steps=12, die_trainer_1="139 1")
    runs["stuck"].wish(never_save=1, die_trainer_1="1 0", die_trainer_2="1 0", die_trainer_3="1 0")
    runs["mistake"].wish(die_trainer_1="2")
    options = {
        "rank": {"overrides": ["parallel.tensor=2"]},
        "short": {"settings": ['time="00:01:00"', "signal_margin_s=50"]},
        "next": {"after": "rank"},
        "never": {"after": "mistake"},
    }
    for name, run in runs.items():
        own = options.get(name, {})
        if "after" in own:
            own["after"] = f"{runs[own['after']].job}:afterok"
        run.submit(**own)
    return runs


def test_scancel_ends_a_job(batch, cluster):
    run = batch["cancelled"]
    run.until_step(3)
    cluster.ask("scancel", run.job)
    wait_for(lambda: not cluster.ask("squeue", "-h", "-j", run.job), "the end of the job")


def test_usr1_saves_and_the_job_goes_on_after_a_requeue(batch, cluster):
    run = batch["asked"]
    run.until_step(5)
    cluster.ask("scancel", "--batch", "--signal=USR1", run.job)
    wait_for(lambda: run.attempts()[0].get("newest"), "the end of the attempt")
    first = run.attempts()[0]
    assert first["why"] == "stopped and saved (deadline); tried again" and first["newest"] >= 5
    run.wish(steps=first["newest"] + 2)
    assert run.result()["code"] == 0, run.log()
    assert run.steps() == list(range(1, first["newest"] + 3))  # none is missing, none is made twice


def test_a_job_stops_before_its_time_is_up_and_goes_on_after_a_requeue(batch):
    """Nobody asks: the conductor knows when the allocation ends."""
    run = batch["short"]
    first = wait_for(lambda: run.attempts() and run.attempts()[0].get("newest") and run.attempts()[0], "a stop")
    assert first["why"] == "stopped and saved (deadline); tried again" and first["end"] - first["time"] < 50
    run.wish(steps=first["newest"] + 2)
    assert run.result()["code"] == 0, run.log()
    assert run.steps() == list(range(1, first["newest"] + 3))


@pytest.mark.parametrize(("name", "culprit"), [("engine", "engine-0"), ("rank", "trainer")])
def test_a_role_that_dies_ends_the_others_and_the_job_is_tried_again(batch, name, culprit):
    run = batch[name]
    assert run.result()["code"] == 0, run.log()
    first, second = run.attempts()
    code = "7" if name == "engine" else "139 (SIGSEGV)"
    assert first["why"] == f"{culprit} ended with exit code {code}; tried again" and first["verdict"] == "requeue"
    assert f"{culprit} failed first (on " in run.log() and "dies as wished" in run.log()
    assert second["why"] == "the run is done" and first["job"] == second["job"]
    assert os.readlink(run.run / "logs" / "latest") == "attempt-2" and (run.run / "logs" / "attempt-1").is_dir()
    lines = list(status_lines(read_status(run.run)))
    assert "done" in lines[0] and any("attempt 1" in line and culprit in line for line in lines)


def test_a_run_without_progress_is_given_up(batch):
    result = batch["stuck"].result()
    assert result["code"] == 75 and "given up after 2 attempts without a new checkpoint" in result["why"]
    assert len(batch["stuck"].attempts()) == 2


def test_the_users_error_is_never_tried_again(batch):
    result = batch["mistake"].result()
    assert result["code"] == 2 and "only you can mend" in result["why"]
    assert len(batch["mistake"].attempts()) == 1


def test_a_job_after_another_waits_for_its_success(batch, cluster):
    """That other job was requeued meanwhile."""
    assert batch["next"].result()["code"] == 0
    rank, after = batch["rank"], batch["next"]
    assert after.attempts()[0]["time"] > rank.attempts()[-1]["end"] and len(rank.attempts()) == 2
    never = batch["never"]
    wait_for(lambda: not cluster.ask("squeue", "-h", "-j", never.job), "the end of the job")
    assert "State=CANCELLED" in cluster.ask("scontrol", "show", "job", never.job) and not never.attempts()


def test_a_cancelled_job_is_never_requeued(batch, cluster):
    """The other runs were requeued meanwhile, so this one had the time for it."""
    run = batch["cancelled"]
    assert len(run.attempts()) == 1 and run.control("result.json") is None
    assert not cluster.ask("squeue", "-h", "-j", run.job)
    assert "State=CANCELLED" in cluster.ask("scontrol", "show", "job", run.job)


def test_a_split_job_from_another_folder(fake_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = ["ranks_per_node=2", "cpus_per_task=1"]
    assert fake_run.submit(wait=True, settings=settings, overrides=[*FOUR_NODES, "parallel.data=2"]) == 0, (
        fake_run.log()
    )
    assert fake_run.control("done.json")["step"] == 3
    ranks = first_lines(fake_run, "trainer-node*.log")
    assert [line.split(",")[0] for line in ranks] == [f"rank {r} on node{n}" for r, n in enumerate((1, 1, 2, 2))]
    assert all(line.endswith("node1") for line in ranks)  # MASTER_ADDR
    engines = first_lines(fake_run, "engine-?-node*.log")
    assert ["node3" in engines[0], "node4" in engines[1]] == [True, True]
    (attempt,) = fake_run.attempts()
    assert attempt["nodes"] == ["node1", "node2", "node3", "node4"] and attempt["why"] == "the run is done"
    assert "the run is done: exit code 0" in capsys.readouterr().out


def test_a_het_job_puts_engines_into_its_second_group(fake_run):
    fake_run.settings = ["rollout.gpus_per_node=4"]
    fake_run.submit(mode="het", overrides=FOUR_NODES)
    assert fake_run.result()["code"] == 0, fake_run.log()
    assert [line.split(",")[0] for line in first_lines(fake_run, "trainer-node*.log")] == [
        "rank 0 on node1",
        "rank 1 on node2",
    ]
    assert len(first_lines(fake_run, "engine-?-node[34]-0.log")) == 2
    facts = json.loads((fake_run.run / "logs" / "latest" / "preflight.json").read_text())
    assert {one["host"]: one["gpus"]["given"] for one in facts} == {"node1": 8, "node2": 8, "node3": 4, "node4": 4}


def test_the_trainer_waits_for_healthy_engines(fake_run):
    fake_run.wish(sick_engine_0="")
    fake_run.submit(settings=["start_timeout_s=4", "requeue.max=0"])
    result = fake_run.result()
    assert result["code"] == 75 and "engine-0" in result["why"]
    log = fake_run.log()
    assert "engine-0 failed first: it was not healthy after 4 s (on node2)" in log and "serving on node2" in log
    assert not first_lines(fake_run, "trainer-*") and "starting trainer" not in log


def test_a_requeue_after_success_does_nothing(fake_run):
    fake_run.submit()
    fake_run.result()
    wait_for(lambda: not fake_run.cluster.ask("squeue", "-h"), "the end of the job")
    fake_run.cluster.ask("scontrol", "requeue", fake_run.job)
    wait_for(lambda: "the run is done already: exit code 0" in fake_run.log(), "the second start")
    assert len(fake_run.attempts()) == 1


def test_cancel_with_save_writes_a_checkpoint_and_ends(fake_run):
    fake_run.wish(steps=ENDLESS)
    fake_run.submit()
    fake_run.until_step(3)
    said = cancel_run(fake_run.run, save=True, patience_s=30)
    step = int(said.removeprefix("saved at step ").removesuffix(", and stopped"))
    assert step >= 3 and (fake_run.run / "checkpoints" / f"step_{step:06d}" / "complete.json").exists()
    result = fake_run.result()
    assert (result["code"], result["why"]) == (130, "stopped on request")
    wait_for(lambda: not fake_run.cluster.ask("squeue", "-h"), "the end of the job")


def test_an_array_has_a_run_for_each_file(fake_run, tmp_path):
    (tmp_path / "sweep").mkdir()
    for name, rate in (("low", 1.0e-6), ("high", 1.0e-5)):
        (tmp_path / "sweep" / f"{name}.yaml").write_text(f"optimizer: {{lr: {rate}}}\n")
    fake_run.wish(steps=ENDLESS)
    fake_run.submit(array=tmp_path / "sweep", settings=["array_limit=2"])
    refusal = rf"job {fake_run.job} is [A-Z]+ and works in .*launch cancel"
    with pytest.raises(ConfigError, match=refusal):
        fake_run.submit(array=tmp_path / "sweep")
    with pytest.raises(ConfigError, match=refusal):
        fake_run.submit(overrides=["run.name=run/high"])
    fake_run.wish(steps=3)
    runs = [FakeRun.at(fake_run, f"run/{name}") for name in ("high", "low")]
    assert [run.result()["code"] for run in runs] == [0, 0]
    assert {run.attempts()[0]["job"].partition("_")[2] for run in runs} == {"0", "1"}
    assert "lr: 1.0e-05" in (runs[0].run / "launch" / "config.yaml").read_text()


def test_a_study_runs_as_an_array_of_its_cells(fake_run):
    base = yaml.safe_load(fake_run.config.read_text()) | {"eval": {"prompts": 2}}
    del base["run"]
    axes = {"objective": {"drpo": {}, "grpo": {"objective": {"name": "grpo", "advantage": "grpo"}}}}
    study = {"base": base, "axes": axes, "budget": {"steps": 3}, "folder": str(fake_run.run)}
    file = fake_run.folder / "study.yaml"
    file.write_text(yaml.safe_dump(study))
    request = StudyRequest(file, slurm=True, profile="virtual", settings=fake_run.stand_ins)
    folder = StudyFolder(fake_run.run)

    def states():
        return [state.status for state in read_states(folder, folder.record())]

    fake_run.wish(steps=ENDLESS)
    assert run_study(request) == 0
    runs = [FakeRun.at(fake_run, f"run/runs/{cell}") for cell in folder.record()["cells"]]
    for run in runs:
        run.until_step(1)
    assert states() == ["running", "running"]
    with pytest.raises(UserError, match="no cell is left to submit"):
        run_study(request)
    fake_run.wish(steps=3)
    assert [run.result()["code"] for run in runs] == [0, 0]
    wait_for(lambda: states() == ["done", "done"], "the end of the array")
    assert "name: grpo" in (runs[1].run / "launch" / "config.yaml").read_text()


def test_test_only_asks_slurm_and_submits_nothing(fake_run, capsys):
    assert fake_run.submit(test_only=True) == 0
    assert fake_run.submit(test_only=True, nodes=9) == 2
    assert "Requested node configuration is not available" in capsys.readouterr().out
    assert not fake_run.cluster.ask("squeue", "-h") and not (fake_run.run / "launch" / "submit.json").exists()


def test_attach_opens_a_shell_on_a_node_of_the_job(fake_run):
    fake_run.wish(steps=ENDLESS)
    fake_run.submit()
    fake_run.until_step(1)
    command = shlex.join(attach_command(fake_run.run, "node2"))
    typed = "echo on $(hostname) in job $SLURM_JOB_ID\nexit\n"
    terminal = ["script", "-qec", command, "/dev/null"]
    done = subprocess.run(terminal, input=typed, capture_output=True, text=True, timeout=30, check=False)
    assert f"on node2 in job {fake_run.job}" in done.stdout, done


def test_a_lost_engine_is_started_again_while_training_goes_on(fake_run):
    """One process dies and comes back on its node; another's node is killed, and it comes back on the spare one."""

    def urls():
        return json.loads((fake_run.run / "log.jsonl").read_text().splitlines()[-1])["urls"]

    fake_run.wish(steps=ENDLESS)
    settings = ["on_engine_loss=continue", "spare_nodes=1"]
    fake_run.submit(settings=settings, overrides=["rollout.servers=2"])
    fake_run.until_step(3)
    before = urls()
    fake_run.wish(die_engine_0_1="7")
    wait_for(lambda: fake_run.log().count("engine-0 is healthy at") == 2, "engine-0 that came back")
    fake_run.cluster.node("kill", "node3")
    try:
        wait_for(lambda: "starting engine-1 on node4" in fake_run.log(), "a restart on the spare node")
        wait_for(lambda: fake_run.log().count("engine-1 is healthy at") == 2, "engine-1 that came back")
        step = fake_run.steps()[-1]
        fake_run.until_step(step + 2)
        after = urls()
        fake_run.wish(steps=fake_run.steps()[-1] + 2)
        assert fake_run.result()["code"] == 0, fake_run.log()
    finally:
        fake_run.cluster.node("start", "node3")
    log = fake_run.log()
    assert "engine-0 is lost (on node2): training goes on with 1 of 2 engines; it is started again (1 of 3)" in log
    assert after[0] == before[0] and after[1] != before[1] and len(after) == 2
    assert log.count("starting engine-1 on node3") == 2 and len(fake_run.attempts()) == 1
    text = (fake_run.run / "logs" / "latest" / "engine-0-node2-0.log").read_text()
    assert text.count("serving on node2") == 2 and "the engine dies as wished" in text


def test_a_preempted_job_saves_and_comes_back(fake_run):
    cluster = fake_run.cluster
    fake_run.wish(steps=ENDLESS)
    fake_run.submit()
    fake_run.until_step(3)
    cluster.ask(
        "sbatch", "-p", "high", "-w", "node1,node2", "--gpus-per-node=8", "-o", "/dev/null", "--wrap", "sleep 1"
    )
    fake_run.until_attempt(2)
    first, second = fake_run.attempts()
    assert second["checkpoint"] >= 3 and first["job"] == second["job"]
    fake_run.wish(steps=second["checkpoint"] + 3)
    assert fake_run.result()["code"] == 0, fake_run.log()


def test_a_second_job_in_the_same_folder_is_refused_also_if_it_is_started_by_hand(fake_run):
    fake_run.wish(steps=ENDLESS)
    fake_run.submit()
    with pytest.raises(ConfigError, match=rf"job {fake_run.job} is [A-Z]+ and works in .*launch cancel"):
        fake_run.submit()
    fake_run.until_step(1)
    fake_run.cluster.ask("sbatch", str(fake_run.run / "launch" / "job.sbatch"))
    refusal = f"job {fake_run.job} works in {fake_run.run}: this one starts nothing: exit code 2"
    wait_for(lambda: refusal in fake_run.log(), "the end of the second job")
    assert len(fake_run.attempts()) == 1 and fake_run.control("result.json") is None


def test_preflight_names_the_sabotaged_node_and_the_job_goes_on_without_it(fake_run):
    cluster, hosts = fake_run.cluster, fake_run.cluster.folder / "hosts-node3"
    honest = hosts.read_text()
    fake_run.run.joinpath("control").mkdir(parents=True)
    scratch = fake_run.folder / "scratch"
    scratch.mkdir()
    code = ROOT / "megatron_rl" / "__init__.py"
    (fake_run.folder / "other.py").write_text(code.read_text() + "# an older checkout\n")
    try:
        hosts.write_text(
            honest.replace(next(line for line in honest.splitlines() if "node1" in line), "127.0.1.1 node1")
        )
        cluster.inside("node3", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(fake_run.run / "control"))
        cluster.inside("node3", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(scratch))
        cluster.inside("node3", "mount", "--bind", str(fake_run.folder / "other.py"), str(code))
        fake_run.submit(settings=[f"scratch={scratch}"], nodes=3)
        wait_for(lambda: "submitted again as job" in fake_run.log(), "a second job")
        log = fake_run.log()
        assert "3 nodes, 1 refused" in log and "; tried again without node3" in log
        words_of_faults = ("takes node1 for itself", f"run folder {fake_run.run} is not shared", f"{scratch} has 0.00")
        for words in (*words_of_faults, "its megatron_rl differs from that of most nodes"):
            assert any("refused node3" in line and words in line for line in log.splitlines()), words
        assert fake_run.result()["code"] == 0, log
        assert [one["nodes"] for one in fake_run.attempts()] == [
            ["node1", "node2", "node3"],
            ["node1", "node2", "node4"],
        ]
    finally:
        hosts.write_text(honest)
        for folder in (fake_run.run / "control", scratch, code):
            cluster.inside("node3", "umount", str(folder))


def test_busy_ports_are_avoided(fake_run):
    """The engine's port is 10 above the first of the block. All but the lowest possible one are taken."""
    listener = "import socket, sys; s = [socket.create_server(('', p)) for p in range(21011, 21022)]; sys.stdin.read()"
    pid = (fake_run.cluster.folder / "pids" / "slurmd-node2.pid").read_text().strip()
    holder = subprocess.Popen(["nsenter", "-t", pid, "-n", sys.executable, "-c", listener], stdin=subprocess.PIPE)
    try:
        fake_run.submit(settings=["ports=[21000, 21022]"])
        assert fake_run.result()["code"] == 0, fake_run.log()
    finally:
        holder.communicate()
    first = pick_block(int(fake_run.job), 1, 11, (21000, 21022))
    assert (f"ports from {first} are in use on node2" in fake_run.log()) == (first != 21000)


def test_the_preflight_command_names_a_node(fake_run, capfd):
    assert run_preflight("virtual", [f"python={HERE / 'fake_python'}"], 4, fake_run.folder) == 0
    fake_run.cluster.inside("node2", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm")
    try:
        assert run_preflight("virtual", [f"python={HERE / 'fake_python'}"], 4, fake_run.folder) == 1
    finally:
        fake_run.cluster.inside("node2", "umount", "/dev/shm")
    out = capfd.readouterr().out
    assert "4 nodes, 0 refused" in out and "refused node2: /dev/shm has 0.00105 GB free, 0.01 are required" in out


def test_preflight_with_bandwidth_names_the_node_with_a_slow_link(fake_run, capfd):
    settings = [f"python={sys.executable}", "min_bandwidth_gb_s=0.02"]
    shape = ["qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "40mbit", "burst", "32kb", "latency", "100ms"]
    try:
        fake_run.cluster.inside("node3", "tc", *shape)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this kernel cannot slow a link down: {error}")
    try:
        assert run_preflight("virtual", settings, 3, fake_run.folder, bandwidth_mb=2) == 1
    finally:
        fake_run.cluster.inside("node3", "tc", "qdisc", "del", "dev", "eth0", "root")
    out = capfd.readouterr().out
    assert "bandwidth: 3 pairs" in out and "refused node3: at most 0.0" in out and out.count("bandwidth: refused") == 1


def test_tasks_of_srun_are_ranks_of_one_world(cluster):
    code = "import os; from megatron_rl.launch.ranks import under_launcher as u; print(u(), *(os.environ[n] for n in "
    code += "('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'GLOO_SOCKET_IFNAME')))"
    lines = cluster.ask("srun", "-N2", "-n3", "--distribution=block", sys.executable, "-c", code).splitlines()
    assert sorted(lines) == [
        "True 0 0 3 2 node1 eth0",
        "True 1 1 3 2 node1 eth0",
        "True 2 0 3 1 node1 eth0",
    ]


@pytest.mark.parametrize("text", ["node[1-3,7],m5-[01-02]", "r[1-2]c[08-10]", "a,b[3]"])
def test_host_lists_are_those_of_slurm(cluster, text):
    assert expand_hosts(text) == cluster.ask("scontrol", "show", "hostnames", text).split()


def test_a_killed_node_is_replaced_by_a_requeue(fake_run):
    fake_run.wish(steps=ENDLESS)
    fake_run.submit()
    fake_run.until_step(3)
    fake_run.cluster.node("kill", "node2")
    try:
        job = fake_run.job
        wait_for(lambda: fake_run.cluster.ask("squeue", "-h", "-j", job, "-o", "%T") == "PENDING", "a requeue")
        fake_run.cluster.node("start", "node2")
        fake_run.until_attempt(2)
    finally:
        fake_run.cluster.node("start", "node2")
    saved = fake_run.attempts()[1]["checkpoint"]
    assert saved >= 3
    fake_run.wish(steps=saved + 3)
    assert fake_run.result()["code"] == 0, fake_run.log()
    assert fake_run.attempts()[0]["job"] == fake_run.attempts()[1]["job"]
