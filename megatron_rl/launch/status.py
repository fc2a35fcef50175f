"""What a run is doing: from its control files, its log, and Slurm."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.files import parse_json
from megatron_rl.launch.conductor.control_files import (
    ATTEMPTS,
    newest_checkpoint,
    read_json,
    read_json_lines,
    remove,
    write_json,
)
from megatron_rl.launch.conductor.role_processes import find_logs, last_lines
from megatron_rl.launch.conductor.run_files import summarize
from megatron_rl.launch.conductor.slurm_commands import call_slurm, job_state
from megatron_rl.launch.conductor.slurm_states import SILENT, read_state

_LOG_TAIL = 1 << 16  # bytes of the run log that are read for the last step
_SILENT_S = 120  # the conductor writes a sign of life every 10 s
_FIELDS = ("state", "reason", "elapsed", "limit", "nodes")


def find_run(name: str) -> Path:
    """Return the run folder for a path or the id of a job.

    Raises:
        UserError: there is no run folder, or Slurm does not know the job.
    """
    if not name.split("_")[0].isdecimal() or Path(name).is_dir():
        if not (Path(name) / "control").is_dir():
            raise UserError(f"{name} is not the folder of a launched run: it has no folder control")
        return Path(name).absolute()
    folder = _fields_of_job(name).get("WorkDir")  # the job runs in RUN/launch
    if folder is None:
        why = "does not respond" if _is_silent(name) else f"does not know job {name} any more"
        raise UserError(f"Slurm {why}: name the run folder instead")
    return Path(folder).parent


def _fields_of_job(job: str) -> dict[str, str]:
    """Return the fields of `scontrol show job`; {} if Slurm has forgotten the job."""
    if shutil.which("scontrol") is None:
        return {}
    reply = call_slurm(["scontrol", "show", "job", "-o", job])
    words = reply.out.split("\n")[0].split() if reply.code == 0 else []
    return dict(word.split("=", 1) for word in words if "=" in word)


def read_status(run: Path) -> dict[str, Any]:
    """Return what is known about a run, as plain values."""
    control = run / "control"
    record = read_json(str(run / "launch" / "submit.json")) or {}
    jobs = [str(job) for job in record.get("jobs", [])]
    done = read_json(str(control / "done.json"))
    attempts = summarize(read_json_lines(str(control / ATTEMPTS)))
    deadline = read_json(str(control / "deadline"))
    beat = read_json(str(control / "conductor"))
    step = newest_checkpoint(str(run))
    slurm = _ask_slurm(jobs[-1]) if jobs else {}
    return {
        "run": str(run),
        "jobs": jobs,
        "slurm": slurm,
        "meaning": _meaning(slurm, done is not None, read_json(str(control / "result.json"))),
        "attempts": attempts,
        "result": read_json(str(control / "result.json")),
        "done": done,
        "stopped": read_json(str(control / "stopped.json")),
        "last_step": _last_step(run / "log.jsonl"),
        "checkpoint": None if step < 0 else step,
        "seconds_to_deadline": None if deadline is None else round(deadline["time"] - time.time()),
        "conductor_silent_s": None if beat is None else round(time.time() - beat["time"]),
    }


def _ask_slurm(job: str) -> dict[str, str]:
    """Return state, reason, times and nodes of a job, from squeue, else from scontrol, which remembers longer."""
    if shutil.which("squeue") is None:
        return {}
    reply = call_slurm(["squeue", "-h", "-j", job, "-o", "%T|%r|%M|%l|%R"])
    line = reply.out.strip().split("\n")[0]
    if reply.code == 0 and line.count("|") == 4:
        return dict(zip(_FIELDS, line.split("|"), strict=True))
    fields = _fields_of_job(job)
    names = ("JobState", "Reason", "RunTime", "TimeLimit", "NodeList")
    found = dict(zip(_FIELDS, (fields.get(name, "") for name in names), strict=True))
    if found["state"]:
        return found
    return dict.fromkeys(_FIELDS, "") | {"state": SILENT} if _is_silent(job) else {}


def _is_silent(job: str) -> bool:
    return shutil.which("squeue") is not None and job_state(job) == SILENT


def _meaning(slurm: dict[str, str], done: bool, result: dict[str, Any] | None) -> str:
    if done and result is not None:
        return "done"
    if slurm:
        return read_state(slurm["state"], slurm["reason"], done=done)
    if done:
        return "done"
    return "unknown to Slurm" if result is None else "ended"


def _last_step(log: Path) -> dict[str, Any] | None:
    """Return the last step's record, or None. Only the end of the log is read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_TAIL))
            lines = file.read().decode("utf-8", "replace").split("\n")[:-1]
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = parse_json(line)
        except ValueError:  # the first line may be cut
            continue
        if isinstance(record, dict) and record.get("kind") == "step":
            return record
    return None


def status_lines(status: dict[str, Any]) -> Iterator[str]:
    """Yield a status as lines of text."""
    slurm = status["slurm"]
    known = slurm and slurm["state"] != SILENT
    words = f" ({slurm['state']}, {slurm['reason']}, {slurm['elapsed']} of {slurm['limit']})" if known else ""
    yield f"{status['run']}: {status['meaning']}{words}"
    if status["jobs"]:
        yield f"  jobs: {', '.join(status['jobs'])}"
    step = status["last_step"]
    if step is not None:
        reward = step.get("reward/mean")
        yield f"  step {step['step']}" + ("" if reward is None else f", mean reward {reward:.4g}")
    if status["checkpoint"] is not None:
        yield f"  newest checkpoint: step {status['checkpoint']}"
    if status["seconds_to_deadline"] is not None and status["result"] is None:
        yield f"  {status['seconds_to_deadline']} s to the end of the allocation"
    silent = status["conductor_silent_s"]
    if silent is not None and silent > _SILENT_S and slurm.get("state") == "RUNNING":
        yield f"  warning: the conductor has said nothing for {silent} s; if its node is lost, cancel the job"
    for one in status["attempts"]:
        ended = f"{one['why']}" if "why" in one else "runs, or was ended by Slurm"
        yield f"  attempt {one['attempt']} on {', '.join(one.get('nodes', ()))}: {ended}"
    if status["result"] is not None:
        yield f"  result: {status['result']['why']}, exit code {status['result']['code']}"
    yield from _failure_lines(status)


def _failure_lines(status: dict[str, Any]) -> Iterator[str]:
    """Yield the end of the trainer's log if the run has failed."""
    if status["result"] is None or status["result"]["code"] in (0, 130):
        return
    for path in find_logs(str(Path(status["run"]) / "logs" / "latest"), "trainer")[:1]:
        yield f"  the end of {path}:"
        yield from (f"    {line}" for line in last_lines(path, 10))


def print_logs(run: Path, role: str, attempt: str, node: str | None, *, follow: bool) -> None:
    """Print the logs of a role.

    Args:
        run: the run folder.
        role: a role such as trainer or engine-0, engine for all engines, or conductor.
        attempt: a number, or latest.
        node: only logs of this node.
        follow: do not end, but go on with what is appended.

    Raises:
        UserError: there is no such log.
    """
    paths = _log_paths(run, role, attempt, node)
    if not paths:
        raise UserError(f"there is no log of {role} in {run / 'logs'} for attempt {attempt}")
    offsets = dict.fromkeys(paths, 0)
    while True:
        for path in paths:
            with path.open("rb") as file:
                file.seek(offsets[path])
                text = file.read()
                offsets[path] = file.tell()
            if text:
                head = f"==> {path}\n" if len(paths) > 1 else ""
                print(head + text.decode("utf-8", "replace"), end="", flush=True)
        if not follow:
            return
        time.sleep(1.0)


def _log_paths(run: Path, role: str, attempt: str, node: str | None) -> list[Path]:
    if role == "conductor":
        return sorted((run / "logs").glob("sbatch-*.log"))
    folder = run / "logs" / ("latest" if attempt == "latest" else f"attempt-{attempt}")
    names = find_logs(str(folder), role)
    return [Path(name) for name in names if node is None or f"-{node}-" in Path(name).name]


def attach_command(run: Path, node: str | None) -> list[str]:
    """Return the command that opens a shell on a node of a running job.

    Raises:
        UserError: the run has no job.
    """
    jobs = (read_json(str(run / "launch" / "submit.json")) or {}).get("jobs", [])
    if not jobs:
        raise UserError(f"{run} has no job of Slurm to attach to")
    where = ["-w", node] if node else []
    return ["srun", f"--jobid={jobs[-1]}", "--overlap", "-N1", "-n1", *where, "--pty", os.environ.get("SHELL", "bash")]


def cancel_run(run: Path, *, save: bool, patience_s: float) -> str:
    """Cancel a run and the jobs that follow it. Return what was done, in words.

    Args:
        run: the run folder.
        save: let the trainer write a checkpoint first.
        patience_s: seconds to wait for that.

    Raises:
        UserError: Slurm does not respond, so the jobs were not ended.
    """
    control = run / "control"
    jobs = [str(job) for job in (read_json(str(run / "launch" / "submit.json")) or {}).get("jobs", [])]
    running = not jobs or _ask_slurm(jobs[-1]).get("state") in ("RUNNING", SILENT)
    said = "cancelled"
    if running and (save or not jobs):
        token = (read_json(str(control / "attempt")) or {}).get("token", 0)
        write_json(str(control / "stop"), {"reason": "cancel", "attempt": token})
        said = _await_stop(run, patience_s)
    write_json(str(control / "cancel"), {"time": time.time()})
    if jobs:
        reply = call_slurm(["scancel", "--quiet", *jobs], 3)
        if reply.code and _is_silent(jobs[-1]):
            raise UserError(
                f"Slurm does not respond, so jobs {', '.join(jobs)} were not ended; nothing is tried again after them. "
                f"When it responds: scancel {' '.join(jobs)}"
            )
    remove(str(control / "stop"))
    return said


def _await_stop(run: Path, patience_s: float) -> str:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if read_json(str(run / "control" / "result.json")) is not None:
            stopped = read_json(str(run / "control" / "stopped.json"))
            return "ended" if stopped is None else f"saved at step {stopped.get('step')}, and stopped"
        time.sleep(0.2)
    return f"cancelled without a checkpoint, because the trainer did not stop within {patience_s:g} s"
