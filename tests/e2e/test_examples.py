"""Every example runs as its README says, at toy size; and one runs from an installed wheel, outside of the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from megatron_rl.report import write_report
from tests.e2e.command import ROOT, Command, records
from tests.e2e.test_sglang import PYTHON

EXAMPLES = ROOT / "examples"
NAMES = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir())
TOY = ["run.steps=2", "run.attribute_every=0", "eval.prompts=0"]
TOY += ["rollout.prompts_per_step=2", "optimizer.updates_per_step=1"]

pytestmark = pytest.mark.slow


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """A copy of the examples outside of the checkout."""
    return Path(shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("model", "runs")))


def run(python: Path | str, folder: Path, *arguments: str, path: str | None = None) -> str:
    """Run a command of this interpreter in a folder, and return its output. `path` is PYTHONPATH."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": "1", **({} if path is None else {"PYTHONPATH": path})}
    done = subprocess.run(
        [str(python), *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def commands(folder: Path) -> list[str]:
    """Return the commands of an example's README, in order."""
    lines = (folder / "README.md").read_text().splitlines()
    return [
        line.strip().partition(" #")[0].strip() for line in lines if line.startswith(("    python", "    megatron"))
    ]


def test_the_list_of_examples_names_each() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    assert NAMES and all(f"({name}/README.md)" in listed for name in NAMES)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that the examples' script writes."""
    folder = tmp_path_factory.mktemp("example") / "model"
    run(sys.executable, EXAMPLES, "make_model.py", str(folder), path=str(ROOT))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_with_the_commands_of_its_readme(examples, model, name) -> None:
    folder = examples / name
    make, train, report = commands(folder)[:3]
    assert (make, train) == ("python ../make_model.py model", "megatron-rl train config.yaml")
    shutil.copytree(model, folder / "model")
    toy = TOY
    if name == "06_async_sglang":
        if not PYTHON.is_file():
            pytest.skip("no .venv-sglang: make sglang")
        toy = [*TOY, f"rollout.sglang.python={PYTHON}"]
    command = Command([*train.split()[1:], *toy], folder, {})
    try:
        result = command.wait(timeout=400)
    finally:
        command.end()
    assert result.code == 0, result.all
    (run_folder,) = (folder / "runs").iterdir()
    assert [step["step"] for step in records(run_folder)] == [0, 1]
    assert report == f"megatron-rl report runs/{run_folder.name}"
    assert write_report(run_folder).is_file()


def test_the_examples_of_your_own_code_log_its_metrics_and_digests(examples, model) -> None:
    for name in ("02_your_reward", "03_your_objective"):
        folder = examples / name
        shutil.copytree(model, folder / "model")
        command = Command(["train", "config.yaml", *TOY, "run.steps=1"], folder, {})
        try:
            result = command.wait()
        finally:
            command.end()
        assert result.code == 0, result.all
        (run_folder,) = (folder / "runs").iterdir()
        assert {"reward/mean", "reward/digits", "reward/in_order"} <= records(run_folder)[0].keys()
        digests = json.loads((run_folder / "plugins.json").read_text())
        assert digests and all(str(examples) in digest["path"] for digest in digests.values())


def test_an_installed_wheel_runs_an_example_outside_of_the_checkout(examples, tmp_path) -> None:
    source = tmp_path / "source"  # a build writes next to its sources
    shutil.copytree(ROOT / "megatron_rl", source / "megatron_rl", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", "dist", "."]
    run(sys.executable, source, "-m", "pip", *build)
    (wheel,) = (source / "dist").glob("megatron_rl-*.whl")
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    run(
        sys.executable, tmp_path, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)
    )
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")}))
    (packages / "tested_packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n")

    folder = examples / "02_your_reward"
    where = run(python, folder, "-c", "import megatron_rl; print(megatron_rl.__file__)")
    assert Path(where.strip()).is_relative_to(tmp_path / "env"), where
    run(python, folder, "../make_model.py", "model")
    job = ["launch", "slurm", "config.yaml", "--profile", "generic", "--dry-run", "--set", f"host_python={python}"]
    rendered = run(tmp_path / "env" / "bin" / "megatron-rl", folder, *job)
    assert f"exec {python} -E -s {folder}/runs/your_reward/launch/code" in rendered
    run(tmp_path / "env" / "bin" / "megatron-rl", folder, "train", "config.yaml", *TOY)
    assert [step["step"] for step in records(folder / "runs" / "your_reward")] == [0, 1]
