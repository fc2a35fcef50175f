"""`launch local`: the conductor of Slurm jobs on this machine, without srun. It resumes a run that crashed."""

import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.config import load_config
from megatron_rl.errors import ConfigError
from megatron_rl.launch.conductor.decide import TRAINER
from megatron_rl.launch.conductor.run_job import run_conductor
from megatron_rl.launch.engine_commands import with_absolute_paths
from megatron_rl.launch.job_folder import (
    JobParts,
    copy_conductor,
    forget_earlier,
    job_json,
    trainer_command,
    write_run_files,
)
from megatron_rl.launch.layout import JobLayout, Role
from megatron_rl.launch.profile import Profile, RequeueProfile
from megatron_rl.trainer.preflight import check
from megatron_rl.trainer.run_folder import check_run_folder


def run_local(config_file: Path, overrides: Sequence[str], *, attempts: int, resume: bool) -> int:
    """Run a job on this machine until it is done, stopped, or has failed too often. Return the exit code.

    Args:
        config_file: the YAML file.
        overrides: each `section.key=value`.
        attempts: how often the run is started at most.
        resume: the run folder holds a run that goes on.

    Raises:
        ConfigError: the configuration cannot be honored, or the run folder holds another run.
    """
    config = with_absolute_paths(load_config(config_file, list(overrides)))
    if attempts < 1:
        raise ConfigError(f"--attempts is {attempts}; it is at least 1")
    check_run_folder(config, resume=resume)
    check(config)
    requeue = RequeueProfile(max=attempts - 1, max_without_progress=max(attempts, 1))
    profile = Profile(gpus_per_node=0, python=sys.executable, host_python=sys.executable, requeue=requeue)
    trainer = Role(TRAINER, "trainer", 0, 0, 1, 1)
    layout = JobLayout("local", (), (trainer,))
    command = trainer_command(sys.executable, config.run.folder, engines=0)
    name = f"local-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    parts = JobParts(config, profile, layout, {TRAINER: command}, {}, name)
    folder = parts.run / "launch"
    write_run_files(parts, job_json(parts, folder / "job.sbatch", folder / "submit.json"))
    forget_earlier(parts.run)
    copy_conductor(folder)
    return run_conductor([str(folder / "job.json")])
