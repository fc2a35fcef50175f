"""The folder of a job, `RUN/launch`: everything that the conductor reads, and a record of what was submitted."""

import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import megatron_rl
from megatron_rl.config import Config
from megatron_rl.errors import ConfigError
from megatron_rl.launch.conductor.commands_of_steps import Filled, srun_command
from megatron_rl.launch.conductor.control_files import remove, write_json
from megatron_rl.launch.conductor.decide import TRAINER
from megatron_rl.launch.conductor.run_files import ENGINES, OF_AN_ATTEMPT
from megatron_rl.launch.engine_commands import sglang_key_file
from megatron_rl.launch.layout import JobLayout, Role
from megatron_rl.launch.profile import Profile, dump_profile
from megatron_rl.launch.render import gpu_options
from megatron_rl.protocol.api_key import new_key, write_private
from megatron_rl.trainer.provenance import git_output, git_revision

_PACKAGE = Path(megatron_rl.__file__).parent
_SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
_MAIN = '"""The conductor of this job; a copy from the time of submission."""\n\n'
_MAIN += "from megatron_rl.launch.conductor.run_job import main\n\nmain()\n"


@dataclass(frozen=True)
class JobParts:
    """What a job is made of.

    Attributes:
        config: the resolved configuration, with absolute paths.
        profile: the cluster.
        layout: nodes and roles.
        commands: the command of each role, with placeholders.
        variables: further variables of engines.
        submission: name of the submission; attempts are counted by it.
    """

    config: Config
    profile: Profile
    layout: JobLayout
    commands: Mapping[str, Sequence[str]]
    variables: Mapping[str, str]
    submission: str

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.config.run.folder


def trainer_command(python: str, run: Path, *, engines: int) -> list[str]:
    """Return the command of the trainer; it resumes by itself, so that one command serves all attempts.

    Args:
        python: the interpreter with megatron-rl.
        run: the run folder.
        engines: number of engines that the job starts, and that the conductor registers; 0: the run starts its own.
    """
    urls = [f"rollout.urls_dir={run / 'control' / ENGINES}", f"rollout.servers={engines}"]
    urls = [*urls, f"rollout.api_key_file={key_file(run)}"] if engines else []
    return [python, "-m", "megatron_rl", "train", str(run / "launch" / "config.yaml"), *urls, "--resume=auto"]


def key_file(run: Path) -> Path:
    """Return the file of a run with the key of its engines."""
    return run / "launch" / "api-key"


def job_json(parts: JobParts, script: Path, submit: Path) -> dict[str, Any]:
    """Return the content of job.json, all that the conductor knows of a job.

    Args:
        parts: the job.
        script: the job file, to submit it again.
        submit: the record of submissions.
    """
    p, layout = parts.profile, parts.layout
    python = p.python or "python"
    container = p.container.model_dump(mode="json")
    container |= {"gpus": bool(p.gpus_per_node), "mounts": _mounts(parts)}
    return {
        "mode": layout.mode,
        "run": str(parts.run),
        "groups": list(layout.groups),
        "submission": parts.submission,
        "script": str(script),
        "submit": str(submit),
        "code": str(script.parent / "code"),
        "host_python": p.host_python,
        "python": python,
        # pyxis gives containers to steps of srun alone, and preflight runs outside of them.
        "versions_python": "" if p.container.backend == "pyxis" else python,
        "versions": {"megatron_rl": megatron_rl.__version__, "git": git_revision()},
        "exclude": p.exclude,
        "ports": list(p.ports),
        "env": environment_of_roles(p),
        "container": container,
        "roles": [_role(role, parts) for role in layout.roles],
        "rules": {
            "preflight": p.preflight == "facts" and bool(layout.groups),
            "start_timeout": p.start_timeout_s,
            "margin": p.signal_margin_s,
            "most_requeues": p.requeue.max,
            "most_without_progress": p.requeue.max_without_progress,
            "requeue_on": list(p.requeue.on),
            "least_engines": p.min_engines if p.on_engine_loss == "continue" else 0,
            "most_restarts": p.engine_restarts if p.on_engine_loss == "continue" else 0,
            "spares": layout.spares,
        },
        "preflight": {"scratch": str(p.scratch), "min_free_gb": p.min_free_gb, "min_shm_gb": p.min_shm_gb},
    }


def _role(role: Role, parts: JobParts) -> dict[str, Any]:
    p = parts.profile
    variables = dict(parts.variables) if role.name != TRAINER else {}
    return asdict(role) | {
        "command": list(parts.commands[role.name]),
        "env": variables,
        "cpus": p.cpus_per_task,
        "gpu_flags": gpu_options(p.gpu_request, role.gpus),
    }


def environment_of_roles(p: Profile) -> dict[str, str]:
    """Return the profile's variables; roles in this environment import the package from where the command did."""
    if p.container.backend != "none":
        return dict(p.env)
    paths = [str(_PACKAGE.parent), p.env.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))]
    return {**p.env, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _mounts(parts: JobParts) -> list[str]:
    """Return the profile's mounts, and those of the run's own folders that they do not cover."""
    mounts = list(parts.profile.container.mounts)
    covered = [Path(mount.split(":")[0]) for mount in mounts]
    config = parts.config
    files = [path.parent for path in (config.task.data, config.task.eval_data) if path is not None]
    folders = [parts.run, config.model.path, *files]
    folders += [path for path in (config.model.reference, config.rollout.weights_dir) if path is not None]
    for folder in folders:
        if not any(folder.is_relative_to(path) for path in covered):
            mounts.append(f"{folder}:{folder}")
            covered.append(folder)
    return mounts


def steps_text(job: Mapping[str, Any]) -> str:
    """Return the srun command of every role as text, with words in place of what is known only in the job."""
    engines = [role["name"] for role in job["roles"] if role["kind"] == "engine"]
    filled = Filled(
        attempt=1,
        logs=f"{job['run']}/logs/attempt-1",
        addresses={name: f"<address of {name}>" for name in engines},
        ports={name: 20010 + number for number, name in enumerate(engines)},
        job="<job>",
    )
    lines = []
    for role in job["roles"]:
        words = srun_command(job, role, filled)
        lines += [f"# {role['name']}", _wrap(words), ""]
    return "\n".join(lines)


def _wrap(words: Sequence[str]) -> str:
    """Return a command as lines that a shell joins again, one for every option with its values."""
    lines = [words[0]]
    for word in words[1:]:
        if word.startswith("-"):
            lines.append("   ")
        lines[-1] += f" {shlex.quote(word)}"
    return " \\\n".join(lines)


def write_run_files(parts: JobParts, job: Mapping[str, Any]) -> None:
    """Write the folders of one run: its configuration, profile, environment and code revision, and job.json.

    Raises:
        ConfigError: a folder cannot be made or written.
    """
    launch, control = parts.run / "launch", parts.run / "control"
    try:
        for folder in (launch, control, parts.run / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        (launch / "config.yaml").write_text(parts.config.dump(), encoding="utf-8")
        (launch / "profile.yaml").write_text(dump_profile(parts.profile), encoding="utf-8")
        (launch / "env.txt").write_text(_describe_environment(parts.profile), encoding="utf-8")
        (launch / "git.txt").write_text(f"{git_revision()}\n", encoding="utf-8")
        (launch / "git.diff").write_text(git_output("diff", "HEAD"), encoding="utf-8")
        key = new_key()
        write_private(key_file(parts.run), key)
        if parts.config.rollout.engine == "sglang":
            write_private(sglang_key_file(key_file(parts.run)), f'api-key: "{key}"')
        write_json(str(launch / "job.json"), job)
    except OSError as error:
        raise ConfigError(f"the run folder {parts.run} cannot be written ({error}): choose another run.dir") from error


def forget_earlier(run: Path) -> None:
    """Remove the control files of an earlier submission, so that they do not end this one."""
    for name in ("cancel", "done.json", *OF_AN_ATTEMPT):
        remove(str(run / "control" / name))


def copy_conductor(folder: Path) -> None:
    """Write a copy of the conductor to `folder/code`: a job runs the code of its submission, on any Python."""
    code = folder / "code"
    shutil.rmtree(code, ignore_errors=True)
    package = code / "megatron_rl" / "launch"
    source = _PACKAGE / "launch" / "conductor"
    shutil.copytree(source, package / "conductor", ignore=shutil.ignore_patterns("__pycache__"))
    for empty in (code / "megatron_rl", package):
        (empty / "__init__.py").write_text("", encoding="utf-8")
    (code / "__main__.py").write_text(_MAIN, encoding="utf-8")


def _describe_environment(p: Profile) -> str:
    """Return the variables that the job sets or takes from the shell. Secrets are masked."""
    found = {**{name: os.environ.get(name, "<not set>") for name in p.pass_env}, **environment_of_roles(p)}
    return "".join(f"{name}={mask(name, value)}\n" for name, value in sorted(found.items()))


def mask(name: str, value: str) -> str:
    """Return the value of a variable for a record: stars if its name sounds like a secret."""
    return "***" if _SECRET.search(name) and value != "<not set>" else value
