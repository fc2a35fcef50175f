"""The commands of `megatron-rl study`. Heavy modules are imported by the command that needs them."""

import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_rl.launch.ranks import one_thread

study_app = typer.Typer(help="Run a grid of configurations and seeds from one file, and judge it.")
_StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="YAML file of the study; see docs/study.md")]
_StudyPlace = Annotated[Path, typer.Argument(metavar="STUDY", help="YAML file of the study, or its folder")]


@study_app.command("run")
def study_run(
    study_file: _StudyFile,
    workers: Annotated[int, typer.Option(min=1, max=1000, help="cells that run at the same time, here")] = 1,
    attempts: Annotated[
        int | None,
        typer.Option(min=1, max=100, help="starts of a cell whose error may go away, such as a lost engine; default 2"),
    ] = None,
    gpus_per_worker: Annotated[
        int, typer.Option(min=0, help="GPUs that each worker has for itself; 0: one worker sees all")
    ] = 0,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="also run cells that have failed")] = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="add cells to a study that has results, or change its verdict")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check and print the cells, and run nothing")] = False,
    slurm: Annotated[bool, typer.Option("--slurm", help="submit an array to Slurm; needs --profile")] = False,
    profile: Annotated[str | None, typer.Option(help="profile of the cluster, as for `launch slurm`")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="key of the profile")] = None,
) -> None:
    """Run the cells that are not done. Start it again to go on after an interruption."""
    with one_thread():  # a second thread, of an import or of a tokenizer, would not survive the forks of cells
        run = _import("run_study")
    request = run.StudyRequest(
        study_file, workers, attempts, gpus_per_worker, retry_failed, extend, dry_run, slurm, profile, settings or ()
    )
    sys.exit(run.run_study(request))


@study_app.command("status")
def study_status(
    study: _StudyPlace, as_json: Annotated[bool, typer.Option("--json", help="print the cells as JSON")] = False
) -> None:
    """Print the state of every cell: done, running, stopped, failed or missing."""
    folder, status = _folder(study), _import("cell_status")
    record = folder.record()
    states = status.read_states(folder, record)
    if as_json:
        print(json.dumps([vars(state) for state in states]))
        return
    status.print_cells(record, states)


@study_app.command("report")
def study_report(study: _StudyPlace) -> None:
    """Collect the results, judge them, and write verdict.json and report/index.html."""
    folder = _folder(study)
    if folder.plans.is_dir():
        _import("results").collect_results(folder)
    verdict = _import("verdict").make_verdict(folder.folder)
    print(_import("page").write_page(folder.folder, verdict))


@study_app.command("compare")
def study_compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="run folder of a finished cell, or folder of a study")],
    b: Annotated[Path, typer.Argument(metavar="B", help="another, that is subtracted")],
    metric: Annotated[str, typer.Option(help="of two cells: sampled or greedy; studies have their own")] = "sampled",
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="of the interval")] = 0.95,
) -> None:
    """Print the paired difference of two finished cells or studies, with its interval."""
    print(_import("compare_cells").compare_results(a, b, metric, confidence))


def _folder(study: Path) -> Any:
    """Return the folder of a study that is named by its file or by its folder."""
    place = _import("study_folder")
    if study.is_dir():
        return place.StudyFolder(study.absolute())
    return place.StudyFolder(_import("study_file").load_study(study)[0].folder)


def _import(module: str) -> Any:
    return importlib.import_module(f"megatron_rl.study.{module}")
