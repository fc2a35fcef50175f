"""Which job works in a folder, and what Slurm says of it."""

import shutil
from pathlib import Path

from megatron_rl.launch.conductor.control_files import read_json
from megatron_rl.launch.conductor.slurm_commands import job_state
from megatron_rl.launch.conductor.slurm_states import FORGOTTEN


def job_of(folder: Path) -> tuple[str, str]:
    """Return the job that waits or runs for a folder, and its state; without one, the last job and FORGOTTEN.

    A job may have been submitted again while other tasks of its array go on, so all jobs of the submission count.

    Args:
        folder: folder of a run or of an array; a task of an array knows its array's record.
    """
    launch = folder / "launch"
    record = (read_json(str(launch / "job.json")) or {}).get("submit", str(launch / "submit.json"))
    jobs = [str(job) for job in (read_json(record) or {}).get("jobs", [])]
    if shutil.which("squeue") is not None:
        for job in reversed(jobs):
            state = job_state(job)
            if state != FORGOTTEN:
                return job, state
    return (jobs[-1] if jobs else ""), FORGOTTEN
