"""The job file: sbatch options and one command, the conductor. What roles do is in job.json, not in bash."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import jinja2

from megatron_rl.launch.layout import JobLayout
from megatron_rl.launch.profile import Profile

# Steps and their Python need these; a job gets no other variables of the submitting shell.
PASSED = ("HOME", "USER", "LOGNAME", "PATH", "LANG", "SLURM_CONF")
_FOLDER = Path(__file__).parent


def render_job(profile: Profile, layout: JobLayout, *, name: str, folder: Path, logs: Path, array: int = 0) -> str:
    """Return the text of a job file.

    Args:
        profile: the cluster.
        layout: nodes and groups.
        name: name of the job.
        folder: folder with `code` and `job.json`; absolute.
        logs: folder for sbatch's own log; it must exist when the job starts.
        array: number of tasks; 0: no array.
    """
    groups = [group_options(profile, layout, number) for number in range(len(layout.groups))]
    log = logs / ("sbatch-%A_%a.log" if array else "sbatch-%j.log")
    first = [
        f"--job-name={name}",
        f"--output={log}",
        "--open-mode=append",
        f"--chdir={folder}",
        "--requeue",
        f"--export={','.join((*PASSED, *profile.pass_env))}",
        f"--signal=B:USR1@{profile.signal_margin_s}",
    ]
    if profile.on_engine_loss == "continue":
        first.append("--no-kill")  # else Slurm ends the job with the first node that it loses
    if array:
        first.append(f"--array=0-{array - 1}%{min(array, profile.array_limit)}")
    groups[0] = first + groups[0]
    lines = [f"module load {shlex.quote(module)}" for module in profile.modules]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template("job.sbatch.j2").render(
        groups=[[_quote_option(option) for option in group] for group in groups],
        lines=[*lines, *profile.setup],
        host_python=shlex.quote(profile.host_python),
        code=shlex.quote(str(folder / "code")),
        job=shlex.quote(str(folder / "job.json")),
    )


def group_options(p: Profile, layout: JobLayout, number: int) -> list[str]:
    """Return the options of one group. Not all options of a first group hold for the second, so both have all."""
    second = number == 1
    gpus = p.rollout.gpus_per_node if second and p.rollout.gpus_per_node is not None else p.gpus_per_node
    named = {
        "partition": (p.rollout.partition if second else None) or p.partition,
        "account": p.account,
        "qos": p.qos,
        "reservation": p.reservation,
        "constraint": (p.rollout.constraint if second else None) or p.constraint,
        "exclude": p.exclude,
        "nodelist": p.nodelist,
    }
    options = [f"--nodes={layout.groups[number]}", "--ntasks-per-node=1", f"--time={p.time}"]
    options += [f"--{key}={value}" for key, value in named.items() if value is not None]
    options += [f"--mem={p.mem}"] if p.mem is not None else []
    options += ["--exclusive"] if p.exclusive else []
    options += gpu_options(p.gpu_request, gpus)
    if p.cpus_per_task:  # one task a node, so all CPUs that the roles of a node use
        options.append(f"--cpus-per-task={p.cpus_per_task * max(p.ranks, 1)}")
    return options + [f"--{key}" if value is None else f"--{key}={value}" for key, value in p.sbatch.items()]


def gpu_options(request: str, gpus: int) -> list[str]:
    """Return the option, of sbatch and srun, that requests GPUs of every node."""
    if request == "none" or not gpus:
        return []
    if request == "gpus_per_node":
        return [f"--gpus-per-node={gpus}"]
    kind = request.partition(":")[2]
    return [f"--gres=gpu:{kind}:{gpus}" if kind else f"--gres=gpu:{gpus}"]


def _quote_option(option: str) -> str:
    """Quote the value of an option if it needs it: Slurm reads the lines of a job file much as a shell does."""
    key, separator, value = option.partition("=")
    safe: Sequence[str] = ("%", "@", ",", ":", "[", "]", "(", ")", "&", "|", "*", "=", "!")
    plain = "".join(letter for letter in value if letter not in safe)
    return option if not separator or shlex.quote(plain or "x") == (plain or "x") else f'{key}="{value}"'
