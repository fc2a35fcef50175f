"""Submission: everything that can be wrong is refused first; then the job's folder is written and sbatch is called."""

import getpass
import json
import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config import Config, load_config
from megatron_rl.config.read_yaml import read_file
from megatron_rl.errors import ConfigError, UserError, shorten
from megatron_rl.launch.conductor.control_files import read_json, write_json
from megatron_rl.launch.conductor.decide import STOPPED, TRAINER
from megatron_rl.launch.conductor.slurm_commands import call_slurm, clean_environment
from megatron_rl.launch.conductor.slurm_states import FORGOTTEN, SILENT
from megatron_rl.launch.engine_commands import (
    check_model,
    engine_command,
    engine_environment,
    with_absolute_paths,
)
from megatron_rl.launch.job_folder import (
    JobParts,
    copy_conductor,
    forget_earlier,
    job_json,
    key_file,
    steps_text,
    trainer_command,
    write_run_files,
)
from megatron_rl.launch.job_of_folder import job_of
from megatron_rl.launch.layout import MODES, JobLayout, check_tensor_groups, make_layout
from megatron_rl.launch.profile import Profile, load_profile
from megatron_rl.launch.render import render_job
from megatron_rl.trainer.preflight import check_task
from megatron_rl.trainer.run_folder import check_run_folder

_DEPENDENCIES = ("afterok", "afterany")


@dataclass(frozen=True)
class Request:
    """What the user asks for. The names are those of the command line."""

    config_file: Path
    overrides: Sequence[str]
    profile: str
    settings: Sequence[str] = ()
    mode: str = "split"
    nodes: int | None = None
    after: str | None = None
    array: Path | None = None
    resume: bool = False
    dry_run: bool = False
    test_only: bool = False
    wait: bool = False


def submit_job(request: Request) -> int:
    """Submit a job, or say what would be submitted. Return the exit code of the command.

    Raises:
        ConfigError: a key of the configuration or of the profile cannot be honored.
        UserError: sbatch refuses the job, or Slurm's commands are not there.
    """
    profile = load_profile(request.profile, list(request.settings))
    dependency = _dependency(request.after)
    jobs = [_parts(request, profile, overrides) for overrides in _tasks(request)]
    if request.array is not None:
        check_no_job(jobs[0].run.parent)
    folder = _write(request, jobs)
    script = folder / "job.sbatch"
    if request.dry_run:
        print(script.read_text(encoding="utf-8"))
        print((folder / "steps.txt").read_text(encoding="utf-8"))
        return 0
    _need_slurm()
    if request.test_only:
        reply = call_slurm(["sbatch", "--test-only", *dependency, str(script)], 1, clean_environment(os.environ))
        print(reply.out.strip())
        return 0 if reply.code == 0 else 2
    reply = call_slurm(["sbatch", "--parsable", *dependency, str(script)], 1, clean_environment(os.environ))
    if reply.code:
        raise UserError(f"sbatch refuses {script}: {reply.out.strip()}")
    job = reply.out.strip().split(";")[0]
    _record(folder, job, jobs[0].submission)
    for parts in jobs:
        print(f"job {job}: {parts.run}", flush=True)
    return wait_for_jobs([parts.run for parts in jobs], folder) if request.wait else 0


def _tasks(request: Request) -> list[list[str]]:
    """Return the overrides of each task: those of the command line, and for an array those of each file of a folder."""
    if request.array is None:
        return [list(request.overrides)]
    if request.mode == "het":
        raise ConfigError("--array: Slurm has no arrays of het jobs: take --mode split")
    files = sorted(request.array.glob("*.yaml")) if request.array.is_dir() else []
    if not files:
        raise ConfigError(f"--array: {request.array} is no folder with .yaml files, one a task")
    if len(files) > 1000:
        raise ConfigError(f"--array: {request.array} has {len(files)} files; an array has at most 1000 tasks")
    name = load_config(request.config_file, list(request.overrides)).run.name
    return [[*request.overrides, *_overrides_of(path), f"run.name={name}/{path.stem}"] for path in files]


def _overrides_of(path: Path) -> list[str]:
    tree = read_file(path, {})
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: it must be a mapping, such as `optimizer: {{lr: 1.0e-5}}`")
    flat: dict[str, Any] = {}

    def flatten(block: dict[str, Any], prefix: str) -> None:
        for key, value in block.items():
            if isinstance(value, dict):
                flatten(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = value

    flatten(tree, "")
    return [f"{key}={json.dumps(value)}" for key, value in flat.items()]


def _parts(request: Request, profile: Profile, overrides: list[str]) -> JobParts:
    """Check one run, and return the parts of its job."""
    config = with_absolute_paths(load_config(request.config_file, overrides))
    mode = next((mode for mode in MODES if mode == request.mode), None)
    if mode is None:
        raise ConfigError(f"--mode is '{shorten(request.mode)}'; valid: {', '.join(MODES)}")
    if (mode == "colocated") != config.rollout.colocate:
        asked = "true" if config.rollout.colocate else "false"
        raise ConfigError(
            f"--mode {mode} with rollout.colocate: {asked}: engines that share GPUs with ranks need both --mode "
            "colocated and rollout.colocate: true; take both or neither"
        )
    config = _with_transport(config, mode)
    _check_config(config, profile, resume=request.resume)
    python = profile.python or sys.executable
    profile = profile.model_copy(update={"python": python})
    layout = _layout(config, mode, request.nodes, profile)
    commands: dict[str, Sequence[str]] = {
        role.name: engine_command(config, python, role.gpus, role.local, key_file(config.run.folder))
        for role in layout.engines
    }
    commands[TRAINER] = trainer_command(python, config.run.folder, engines=len(layout.engines))
    gpus = max((role.gpus for role in layout.engines), default=0)
    return JobParts(config, profile, layout, commands, engine_environment(config, gpus), _submission())


def _submission() -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"


def _layout(config: Config, mode: Any, nodes: int | None, profile: Profile) -> JobLayout:
    rollout = config.rollout
    gpus = 0 if not profile.gpus_per_node or profile.engines_per_node else 1
    if rollout.engine == "sglang" and profile.gpus_per_node:
        gpus = rollout.sglang.tensor
    check_tensor_groups(config.parallel.tensor, profile)
    layout = make_layout(mode, config.parallel.world_size, rollout.servers, gpus, nodes, profile)
    if profile.on_engine_loss == "continue" and profile.min_engines > len(layout.engines):
        raise ConfigError(
            f"min_engines is {profile.min_engines}, but the job has {len(layout.engines)} engines: lower it, or raise "
            "rollout.servers"
        )
    return layout


def _with_transport(config: Config, mode: str) -> Config:
    """Return the configuration with a transport that reaches engines on other machines."""
    rollout = config.rollout
    if mode == "colocated":
        return config
    if "transport" not in rollout.model_fields_set and rollout.weights_dir is None:
        print("rollout.transport: distributed, because engines run on other nodes")
        return config.model_copy(update={"rollout": rollout.model_copy(update={"transport": "distributed"})})
    if rollout.transport == "tensor":
        raise ConfigError(
            f"rollout.transport: tensor needs engines on the trainer's machine, and --mode {mode} does not"
        )
    if rollout.transport == "disk" and rollout.weights_dir is None:
        raise ConfigError(
            "rollout.transport: disk without rollout.weights_dir writes weights to the trainer's own memory, which "
            "engines on other nodes cannot read: set rollout.weights_dir to a shared folder, or transport: distributed"
        )
    return config


def _check_config(config: Config, profile: Profile, *, resume: bool) -> None:
    """Check what a job would find out only after it has waited for its nodes."""
    if not config.rollout.own_servers:
        raise ConfigError("rollout.urls, rollout.urls_dir: the launcher starts the engines itself; remove the key")
    folder = config.run.folder
    if any(letter in str(folder) for letter in '"\\\n'):
        raise ConfigError(f"run.dir, run.name: {folder} has a quote, a backslash or a line break: rename it")
    _check_shared(config, profile)
    _check_files(profile)
    if profile.time_s() <= profile.signal_margin_s:
        raise ConfigError(
            f"time: {profile.time} is not longer than signal_margin_s: {profile.signal_margin_s}, so a run would "
            "stop at once: raise --time"
        )
    _check_free(folder, config, resume=resume)
    check_model(config)
    check_task(config)


def _check_free(folder: Path, config: Config, *, resume: bool) -> None:
    """Check that no other job works in the run folder, and that the run there is not done."""
    check_no_job(folder)
    check_run_folder(config, resume=resume)
    done = read_json(str(folder / "control" / "done.json"))
    if done is not None and int(done.get("step", 0)) >= config.run.steps:
        raise ConfigError(
            f"{folder} is done after {done.get('step')} steps: raise run.steps, or choose another run.name"
        )


def check_no_job(folder: Path) -> None:
    """Check that no job waits or runs that was submitted for a folder, of one run or of an array.

    Raises:
        ConfigError: there is one, or Slurm does not respond.
    """
    job, state = job_of(folder)
    if state == SILENT:
        raise ConfigError(f"Slurm does not say whether job {job} still works in {folder}: try again when it responds")
    if state != FORGOTTEN:
        raise ConfigError(f"job {job} is {state} and works in {folder}: megatron-rl launch cancel {folder}")


def _check_shared(config: Config, profile: Profile) -> None:
    if not profile.shared:
        return
    places = {"run.dir": config.run.folder, "model.path": config.model.path}
    optional = {"model.reference": config.model.reference, "rollout.weights_dir": config.rollout.weights_dir}
    places |= {key: path for key, path in optional.items() if path is not None}
    for key, path in places.items():
        if not any(path.is_relative_to(folder) for folder in profile.shared):
            shared = ", ".join(map(str, profile.shared))
            raise ConfigError(
                f"{key}: {path} is in none of the shared folders of the profile ({shared}): move it there"
            )


def _check_files(profile: Profile) -> None:
    if profile.container.backend == "none" and profile.python and not Path(profile.python).is_file():
        raise ConfigError(f"python: there is no file {profile.python}: name the Python of the environment")
    if not Path(profile.host_python).is_file():
        raise ConfigError(
            f"host_python: there is no file {profile.host_python}: name a Python of the nodes, 3.6 or later"
        )
    image = profile.container.image
    if image.startswith("/") and not Path(image).exists():
        raise ConfigError(f"container.image: there is no file {image}")


def _write(request: Request, jobs: Sequence[JobParts]) -> Path:
    """Write the folders of the runs and of the job. Return the folder with job.sbatch."""
    first = jobs[0]
    base = first.run.parent if request.array is not None else first.run
    folder = base / "launch"
    sizes = {parts.layout.groups for parts in jobs}
    if len(sizes) > 1:
        raise ConfigError("--array: tasks need different numbers of nodes; submit them one by one")
    paths = []
    for parts in jobs:
        job = job_json(parts, folder / "job.sbatch", folder / "submit.json")
        write_run_files(parts, job)
        if not request.dry_run:
            forget_earlier(parts.run)
        paths.append(str(parts.run / "launch" / "job.json"))
    folder.mkdir(parents=True, exist_ok=True)
    (base / "logs").mkdir(exist_ok=True)
    if request.array is not None:
        write_json(str(folder / "job.json"), {"tasks": paths})
    copy_conductor(folder)
    text = render_job(
        first.profile,
        first.layout,
        name=base.name.replace(" ", "_"),
        folder=folder,
        logs=base / "logs",
        array=len(jobs) if request.array is not None else 0,
    )
    (folder / "job.sbatch").write_text(text, encoding="utf-8")
    first_job = job_json(first, folder / "job.sbatch", folder / "submit.json")
    (folder / "steps.txt").write_text(steps_text(first_job), encoding="utf-8")
    return folder


def _dependency(after: str | None) -> list[str]:
    if after is None:
        return []
    job, _, kind = after.partition(":")
    kind = kind or _DEPENDENCIES[0]
    if kind not in _DEPENDENCIES or not job.replace("_", "").isdecimal():
        raise ConfigError(f"--after is '{shorten(after)}'; write JOB, JOB:afterok or JOB:afterany")
    return [f"--dependency={kind}:{job}", "--kill-on-invalid-dep=yes"]


def _need_slurm() -> None:
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch on this machine: submit from a login node, or only look with --dry-run")


def _record(folder: Path, job: str, submission: str) -> None:
    record = {
        "jobs": [job],
        "submission": submission,
        "time": time.time(),
        "host": socket.gethostname(),
        "user": getpass.getuser(),
        "command": sys.argv,
    }
    write_json(str(folder / "submit.json"), record)


def wait_for_jobs(runs: Sequence[Path], folder: Path, look_s: float = 1.0, ask_s: float = 10.0) -> int:
    """Wait for the results of runs. Return the first exit code that is not 0, or 0.

    Args:
        runs: the run folders.
        folder: the folder of the job, with submit.json.
        look_s: seconds between two looks at the result files.
        ask_s: seconds between two questions to Slurm, whether the job still exists.
    """
    codes: list[int] = []
    for run in runs:
        asked = time.monotonic()
        while (result := read_json(str(run / "control" / "result.json"))) is None:
            time.sleep(look_s)
            if time.monotonic() - asked > ask_s:
                asked = time.monotonic()
                if job_of(folder.parent)[1] == FORGOTTEN:
                    result = read_json(str(run / "control" / "result.json"))
                    break
        if result is None:
            result = {"code": STOPPED, "why": "the job has ended without a result: it was cancelled, or Slurm ended it"}
        print(f"{run}: {result['why']}: exit code {result['code']}")
        codes.append(int(result["code"]))
    return next((code for code in codes if code), 0)
