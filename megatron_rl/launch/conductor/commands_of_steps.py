"""Command lines: how the roles of a job become `srun` commands, and what is filled in when the job runs."""

import os
import re
from typing import Any, Dict, List, Mapping, NamedTuple

# Variables that steps must not inherit: they confuse nested srun, MPI, or ranks.
_UNSET = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "SLURM_TRES_PER_TASK")
_UNSET_PREFIX = re.compile(r"(PMI_|PMIX_|SLURM_CPU_BIND|SLURM_EXPORT_ENV|SBATCH_|SALLOC_|SLURM_MEM_PER_)")


class Filled(NamedTuple):
    """What is known only when the job runs."""

    attempt: int
    logs: str
    addresses: Dict[str, str]  # of engines, by role
    ports: Dict[str, int]  # of engines, by role
    job: str = ""


def make_url(address: str, port: int) -> str:
    """Return the URL of an engine; an IPv6 address gets brackets."""
    return "http://%s:%d" % ("[%s]" % address if ":" in address else address, port)


def fill_words(words: List[str], role: str, filled: Filled) -> List[str]:
    """Return a command with its placeholders @HOST@, @PORT@ and @ATTEMPT@ replaced."""
    values = {
        "@HOST@": filled.addresses.get(role, ""),
        "@PORT@": str(filled.ports.get(role, "")),
        "@ATTEMPT@": str(filled.attempt),
    }
    return [re.sub("@[A-Z]+@", lambda match: values.get(match.group(), match.group()), word) for word in words]


def srun_command(job: Mapping[str, Any], role: Mapping[str, Any], filled: Filled) -> List[str]:
    """Return the srun command of a role.

    All counts are given, because srun otherwise takes them from the job, and may fill the first node. `--export=ALL` is
    needed, because srun otherwise passes on only the variables that sbatch passes.
    """
    name = role["name"]
    words = ["srun", "--export=ALL", "--mpi=none", "--unbuffered", "--wait=0", "-J", name]
    words += ["-N", str(role["nodes"]), "-n", str(role["tasks"])]
    words += ["--ntasks-per-node=%d" % (role["tasks"] // role["nodes"])]
    words += ["--nodelist=" + role["host"]] if "host" in role else ["--relative=%d" % role["first_node"]]
    words += ["--het-group=%d" % role["group"]] if job["mode"] == "het" else []
    words += ["--cpus-per-task=%d" % role["cpus"]] if role["cpus"] else []
    words += role["gpu_flags"]
    words += ["--overlap"] if role["overlap"] else []
    words += ["--kill-on-bad-exit=1"] if role["kind"] == "trainer" else []
    words += ["--open-mode=append", "-o", os.path.join(filled.logs, name + "-%N-%t.log")]
    words += container_flags(job["container"], name, filled)
    return words + task_command(job, name, filled.logs, fill_words(role["command"], name, filled))


def task_command(job: Mapping[str, Any], role: str, logs: str, command: List[str]) -> List[str]:
    """Return the command of a task: `run_task` around the role's command.

    It runs on the host, except with pyxis, which puts the whole task into the container.
    """
    pyxis = job["container"]["backend"] == "pyxis"
    python = job["python"] if pyxis else job["host_python"]
    task = [python, "-E", "-s", job["code"], "task", logs, role]
    return wrap_command(job["container"], task + command) if pyxis else task + wrap_command(job["container"], command)


def container_flags(container: Mapping[str, Any], role: str, filled: Filled) -> List[str]:
    """Return pyxis's options of srun. The container's name differs between attempts: named containers survive steps."""
    if container["backend"] != "pyxis":
        return []
    flags = ["--container-image=" + container["image"]]
    flags += ["--container-name=mrl-%s-%d-%s" % (filled.job, filled.attempt, role)]
    flags += ["--container-mounts=" + ",".join(container["mounts"])] if container["mounts"] else []
    flags += ["--container-workdir=" + container["workdir"]] if container["workdir"] else []
    flags += ["--container-mount-home" if container["home"] else "--no-container-mount-home"]
    flags += ["--container-writable"] if container["writable"] else []
    return flags + list(container["args"])


def wrap_command(container: Mapping[str, Any], command: List[str]) -> List[str]:
    """Return the command as it runs inside of the task.

    With pyxis it goes through bash, because srun checks that the path exists on the host. apptainer gets no
    `--cleanenv`: that would also remove SLURM_PROCID, which only the task knows.
    """
    if container["backend"] == "pyxis":
        return ["bash", "-c", 'exec "$@"', "bash"] + command
    if container["backend"] == "apptainer":
        words = ["apptainer", "exec"]
        words += ["--nv"] if container["gpus"] else []
        words += [] if container["home"] else ["--no-home"]
        words += ["--writable-tmpfs"] if container["writable"] else []
        for mount in container["mounts"]:
            words += ["--bind", mount]
        words += ["--pwd", container["workdir"]] if container["workdir"] else []
        return words + list(container["args"]) + [container["image"]] + command
    return command


def step_environment(
    inherited: Mapping[str, str], job: Mapping[str, Any], role: Mapping[str, Any], own: Mapping[str, str]
) -> Dict[str, str]:
    """Return the environment of a role.

    Args:
        inherited: the conductor's environment.
        job: the job, with the profile's variables.
        role: the role, with variables of its own.
        own: variables of this attempt, such as MASTER_ADDR.
    """
    kept = {name: value for name, value in inherited.items() if name not in _UNSET and not _UNSET_PREFIX.match(name)}
    kept.update(PYTHONUNBUFFERED="1")
    for more in (job["env"], role["env"], own):
        kept.update(more)
    return kept
