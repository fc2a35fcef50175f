"""`study run`: check the whole grid, write its folder, run what is not done, and collect the results."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_rl.errors import ConfigError, ExitCode, UserError
from megatron_rl.launch.ranks import one_thread
from megatron_rl.study.cell_checks import resolve_cells
from megatron_rl.study.cell_pool import CellPool
from megatron_rl.study.cell_status import DONE, FAILED, RUNNING, CellState, count_line, print_cells, read_states
from megatron_rl.study.grid import make_cells
from megatron_rl.study.study_array import check_for_cluster, check_no_token_budget, submit_cells
from megatron_rl.study.study_file import load_study
from megatron_rl.study.study_folder import StudyFolder, make_record
from megatron_rl.trainer.preflight import check

_ATTEMPTS = 2  # starts of a cell here, by default


@dataclass(frozen=True)
class StudyRequest:
    """What the user asks for. The names are those of the command line."""

    study_file: Path
    workers: int = 1
    attempts: int | None = None
    gpus_per_worker: int = 0
    retry_failed: bool = False
    extend: bool = False
    dry_run: bool = False
    slurm: bool = False
    profile: str | None = None
    settings: Sequence[str] = ()


def run_study(request: StudyRequest) -> int:
    """Run the cells of a study that are not done. Return the exit code of the command.

    Raises:
        ConfigError: the study or one of its cells cannot be honored, or its folder holds results of another one.
    """
    _check_request(request)
    study, base = load_study(request.study_file)
    assert study.folder is not None  # `load_study` sets it
    cells = make_cells(study, base, request.study_file.absolute().parent)
    if request.slurm:
        check_no_token_budget(study.budget.model_dump())
    with one_thread():
        resolved = resolve_cells(cells, study, check_for_cluster if request.slurm else check)
    record = make_record(study, resolved)
    folder = StudyFolder(study.folder)
    if request.dry_run and not request.slurm:
        folder.check(record, resolved, extend=request.extend)
        print_cells(record)
        return ExitCode.DONE
    with ExitStack() as stack:
        folder.make()
        folder.lock(stack)
        folder.write(record, resolved, request.study_file, extend=request.extend)
        if request.slurm:
            return _submit(request, folder)
        todo = _todo(read_states(folder, record), retry_failed=request.retry_failed)
        print(f"{count_line(record, None)}; {len(todo)} to run, {request.workers} at a time: {folder.folder}")
        finished = _run_here(request, folder, todo)
        # Arrow starts threads when it is imported; by now nothing is forked any more.
        from megatron_rl.study.results import collect_results

        states = collect_results(folder)
    print(count_line(record, states))
    return _code(states, finished)


def _check_request(request: StudyRequest) -> None:
    if request.slurm != (request.profile is not None):
        raise ConfigError("--slurm and --profile go together: the profile says what the cluster needs")
    if request.settings and not request.slurm:
        raise ConfigError("--set is about a profile of --slurm")
    if request.slurm and (request.workers > 1 or request.gpus_per_worker):
        raise ConfigError(
            "--workers, --gpus-per-worker are about this machine, and --slurm runs each cell as a task of an array: "
            "leave them out; array_limit of the profile is the number of tasks at a time"
        )
    if request.slurm and request.attempts is not None:
        raise ConfigError(
            "--attempts is about this machine: with --slurm, requeue.max of the profile is the number of further "
            f"attempts; leave it out, or pass --set requeue.max={request.attempts - 1}"
        )
    if request.slurm or request.dry_run:
        return
    if not torch.cuda.is_available():
        if request.gpus_per_worker:
            raise ConfigError(f"--gpus-per-worker {request.gpus_per_worker}: torch sees no GPU here: leave it out")
        return
    here, wanted = torch.cuda.device_count(), request.workers * request.gpus_per_worker
    if request.workers > 1 and not request.gpus_per_worker:
        raise ConfigError(
            f"--workers {request.workers} would share {here} GPUs: say with --gpus-per-worker how many each has"
        )
    if wanted > here:
        raise ConfigError(f"--workers x --gpus-per-worker = {wanted} GPUs, and {here} are here: lower one of them")


def _todo(states: Sequence[CellState], *, retry_failed: bool) -> list[str]:
    left = [DONE, RUNNING] if retry_failed else [DONE, RUNNING, FAILED]
    return [state.cell for state in states if state.status not in left]


def _submit(request: StudyRequest, folder: StudyFolder) -> int:
    assert request.profile is not None  # `_check_request`
    todo = _todo(read_states(folder, folder.record()), retry_failed=request.retry_failed)
    if not todo:
        raise UserError(f"no cell is left to submit: `megatron-rl study report {request.study_file}`")
    return submit_cells(folder, todo, request.profile, request.settings, dry_run=request.dry_run)


def _run_here(request: StudyRequest, folder: StudyFolder, todo: Sequence[str]) -> bool:
    if not todo:
        return True
    pool = CellPool(
        folder,
        folder.record()["budget"],
        workers=min(request.workers, len(todo)),
        attempts=_ATTEMPTS if request.attempts is None else request.attempts,
        gpus=request.gpus_per_worker,
    )
    return pool.run(todo)


def _code(states: Sequence[CellState], finished: bool) -> int:
    """Return the exit code: failed cells come before stopped ones, which the same command goes on with."""
    if not finished:
        return ExitCode.INTERRUPTED
    failed = [state for state in states if state.status == FAILED]
    for state in failed:
        print(f"{state.cell} failed with exit code {state.exit_code}: {state.error}", file=sys.stderr)
    if failed:
        return ExitCode.USER
    return ExitCode.DONE if all(state.status == DONE for state in states) else ExitCode.RETRY
