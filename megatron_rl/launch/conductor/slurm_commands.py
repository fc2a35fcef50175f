"""Slurm's commands, as the conductor uses them: each with a time limit and retries, in the C locale."""

import os
import subprocess
import time
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence

from megatron_rl.launch.conductor.slurm_states import FORGOTTEN, SILENT

_TIMEOUT_S, _TRIES = 30, 5
_PATIENCE_S, _PAUSE_S = 1800.0, 10.0  # a controller that restarts or moves to another machine is back within minutes


class SlurmReply(NamedTuple):
    """The exit code and the output of a command."""

    code: int
    out: str


def call_slurm(command: Sequence[str], tries: int = 1, env: Optional[Mapping[str, str]] = None) -> SlurmReply:
    """Run a command of Slurm. A command that fails is tried again, with a pause that grows.

    Args:
        command: the words of the command.
        tries: how often it is run at most.
        env: the environment; None: this process's.
    """
    reply = SlurmReply(1, "")
    for number in range(tries):
        if number:
            time.sleep(2.0**number / 2)
        reply = _call_once(command, os.environ if env is None else env)
        if reply.code == 0:
            break
    return reply


def _call_once(command: Sequence[str], env: Mapping[str, str]) -> SlurmReply:
    fixed = dict(env, LC_ALL="C", SLURM_TIME_FORMAT="standard")
    try:
        done = subprocess.run(  # a signal must not reach it: it runs in a session of its own
            list(command),
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            timeout=_TIMEOUT_S,
            env=fixed,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        return SlurmReply(124, "%s did not reply within %d s" % (command[0], _TIMEOUT_S))
    except OSError as error:
        return SlurmReply(127, "%s: %s" % (command[0], error))
    return SlurmReply(done.returncode, done.stdout)


def job_key(env: Mapping[str, str]) -> str:
    """Return the name by which Slurm's commands know the job of an environment.

    A task of an array is ARRAY_TASK: the last task's own id is the id of the array. A het job is its leader.
    """
    if env.get("SLURM_ARRAY_JOB_ID"):
        return env["SLURM_ARRAY_JOB_ID"] + "_" + env["SLURM_ARRAY_TASK_ID"]
    return env.get("SLURM_HET_JOB_ID") or env.get("SLURM_JOB_ID", "")


def job_state(key: str) -> str:
    """Return Slurm's word for the state of a job that waits or runs; else FORGOTTEN or SILENT.

    squeue fails for a job that Slurm has forgotten. It also fails if Slurm does not respond. sinfo names no job, so it
    fails only in the second case.
    """
    for number in range(_TRIES):
        if number:
            time.sleep(2.0**number / 2)
        reply = call_slurm(["squeue", "-h", "-j", key, "-o", "%T"])
        if reply.code == 0:
            return (reply.out.split() or [FORGOTTEN])[0]
        if call_slurm(["sinfo", "-h", "-o", "%R"]).code == 0:
            return FORGOTTEN
    return SILENT


def state_at_end(key: str, ended: Callable[[], bool]) -> str:
    """Return `job_state` for the end of an attempt. While Slurm does not respond, it is asked again for half an hour.

    A job is not requeued if its state is not known.

    Args:
        key: Slurm's name of the job.
        ended: returns whether Slurm has sent this process the signal to end.
    """
    limit = time.monotonic() + _PATIENCE_S
    state = job_state(key)
    while state == SILENT and time.monotonic() < limit and not ended():
        time.sleep(_PAUSE_S)
        state = job_state(key)
    return state


def end_of_job(key: str, env: Mapping[str, str]) -> float:
    """Return the time at which the allocation ends, in seconds since 1970; 0: not known."""
    reply = call_slurm(["squeue", "-h", "-j", key, "-o", "%e"])
    word = reply.out.split()[0] if reply.code == 0 and reply.out.split() else ""
    try:
        return time.mktime(time.strptime(word, "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):  # no limit, or a reply of another kind
        return float(env.get("SLURM_JOB_END_TIME", 0))


def steps_of_job(key: str) -> Dict[str, str]:
    """Return the ids of a job's steps by their names. Ids are in any order, so a step is identified by its name."""
    reply = call_slurm(["squeue", "-h", "-s", "-j", key, "-o", "%i %j"], 3)
    pairs = [line.split(None, 1) for line in reply.out.split("\n")]
    return {pair[1].strip(): pair[0] for pair in pairs if len(pair) == 2}


def lost_nodes(nodes: Sequence[str]) -> List[str]:
    """Return those of the nodes that Slurm calls down, failed or silent."""
    reply = call_slurm(["sinfo", "-h", "-N", "-n", ",".join(nodes), "-o", "%N %T"])
    pairs = [line.split() for line in reply.out.split("\n")]
    bad = ("down", "fail", "unknown")
    return sorted({pair[0] for pair in pairs if len(pair) == 2 and (pair[1].startswith(bad) or pair[1].endswith("*"))})


def requeue_job(key: str) -> SlurmReply:
    """Requeue the job in which this process runs: Slurm then ends it and starts it again.

    Slurm ends every process of the job, scontrol among them. So scontrol may fail although the job is requeued; then
    the job is not RUNNING any more.
    """
    reply = call_slurm(["scontrol", "requeue", key])
    if reply.code and job_state(key) not in ("RUNNING", SILENT):
        return SlurmReply(0, reply.out)
    return reply


def clean_environment(env: Mapping[str, str]) -> Dict[str, str]:
    """Return an environment for sbatch: without options from variables and without those of a job around it."""
    dropped = ("SBATCH_", "SALLOC_", "SRUN_", "SLURM_", "SLURMD_")
    return {name: value for name, value in env.items() if name == "SLURM_CONF" or not name.startswith(dropped)}


def resubmit_job(script: str, options: Sequence[str]) -> SlurmReply:
    """Submit a job file again. On success the output is the id of the new job."""
    reply = call_slurm(["sbatch", "--parsable"] + list(options) + [script], 1, clean_environment(os.environ))
    return reply._replace(out=reply.out.strip().split(";")[0]) if reply.code == 0 else reply
