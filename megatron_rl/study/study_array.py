"""A study as a Slurm array: one task for each cell that is not done."""

import shutil
from collections.abc import Sequence

import yaml

from megatron_rl.config import Config
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.launch.conductor.slurm_states import FORGOTTEN, SILENT
from megatron_rl.launch.engine_commands import check_model
from megatron_rl.launch.job_of_folder import job_of
from megatron_rl.launch.submit import Request, submit_job
from megatron_rl.plan import plan_algorithm
from megatron_rl.study.grid import RUNS
from megatron_rl.study.study_folder import StudyFolder
from megatron_rl.trainer.preflight import check_task


def check_for_cluster(config: Config) -> None:
    """Check what a login node can: method, model and task. The nodes check their precision when the task starts."""
    plan_algorithm(config)
    check_model(config)
    check_task(config)


def submit_cells(
    folder: StudyFolder, cells: Sequence[str], profile: str, settings: Sequence[str], *, dry_run: bool
) -> int:
    """Submit an array with a task for each of these cells. Return the exit code of the command.

    Args:
        folder: the folder of the study.
        cells: cells that are not done.
        profile: name or file of a launcher's profile.
        settings: keys of the profile, each `key=value`.
        dry_run: write and print the job, and submit nothing.

    Raises:
        ConfigError: a configuration or the profile cannot be honored.
        UserError: an earlier array waits or runs, sbatch refuses the job, or Slurm's commands are not there.
    """
    job, state = job_of(folder.runs)
    if state == SILENT:
        raise UserError(f"Slurm does not say whether array {job} of this study has ended: try again when it responds")
    if state != FORGOTTEN:
        # Only the array that was submitted last is known, so tasks of this one would be started a second time.
        raise UserError(f"array {job} of this study waits or runs: wait for its end, or end it: scancel {job}")
    array = folder.folder / "array"
    shutil.rmtree(array, ignore_errors=True)
    array.mkdir()
    for cell in cells:
        shutil.copyfile(folder.plan(cell), array / f"{cell}.yaml")
    first = yaml.safe_load(folder.plan(cells[0]).read_bytes())
    base = {"model": {"path": first["model"]["path"]}, "run": {"dir": str(folder.folder), "name": RUNS}}
    file = folder.folder / "array.yaml"
    file.write_text(yaml.safe_dump(base), encoding="utf-8")
    begun = any((folder.run(cell) / "log.jsonl").is_file() for cell in cells)
    return submit_job(Request(file, (), profile, settings, array=array, resume=begun, dry_run=dry_run))


def check_no_token_budget(budget: dict[str, float | None]) -> None:
    """Raise ConfigError for a budget that only the local pool can end early. Its results are cut all the same."""
    if budget["tokens"] is not None or budget["seconds"] is not None:
        raise ConfigError(
            "budget.tokens, budget.seconds: a Slurm array does not watch what its tasks spend: set budget.steps alone"
        )
