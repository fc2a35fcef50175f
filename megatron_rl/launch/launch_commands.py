"""The commands of `megatron-rl launch`. Heavy modules are imported by the command that needs them."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_rl.launch.profile import profile_names

launch_app = typer.Typer(help="Submit runs to Slurm, or supervise one here; look at them, and cancel them.")
_ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; see configs/")]
_Overrides = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="dotted overrides")]
_Run = Annotated[str, typer.Argument(metavar="RUN", help="run folder, or id of a job")]
_Profile = Annotated[str, typer.Option("--profile", help=f"file, or one of: {', '.join(profile_names())}")]
_Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="key of the profile, such as partition=gpu")
]


@launch_app.command("slurm")
def launch_slurm(
    config_file: _ConfigFile,
    profile: _Profile,
    overrides: _Overrides = None,
    settings: _Settings = None,
    mode: Annotated[str, typer.Option(help="split: engines on nodes of their own; het: on another kind")] = "split",
    nodes: Annotated[
        int | None, typer.Option(min=1, help="nodes of the job; default: as many as ranks and rollout.servers need")
    ] = None,
    time: Annotated[str | None, typer.Option(help="time limit, as hours:minutes:seconds")] = None,
    after: Annotated[str | None, typer.Option(help="start after JOB, JOB:afterok or JOB:afterany")] = None,
    requeue_max: Annotated[int | None, typer.Option(min=0, help="most further attempts")] = None,
    array: Annotated[
        Path | None, typer.Option(metavar="DIR", help="one task for each .yaml file of overrides in this folder")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run that the folder holds")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="write and print the job, submit nothing")] = False,
    test_only: Annotated[bool, typer.Option("--test-only", help="also ask sbatch whether it could start")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="wait for the result, and exit with its code")] = False,
) -> None:
    """Submit a run to Slurm."""
    settings = list(settings or [])
    settings += [] if time is None else [f'time="{time}"']
    settings += [] if requeue_max is None else [f"requeue.max={requeue_max}"]
    # The preflight of a submission reads the model and the task's data, for which it imports torch and transformers.
    submit = _import("submit")
    request = submit.Request(
        config_file=config_file,
        overrides=overrides or [],
        profile=profile,
        settings=settings,
        mode=mode,
        nodes=nodes,
        after=after,
        array=array,
        resume=resume,
        dry_run=dry_run,
        test_only=test_only,
        wait=wait,
    )
    sys.exit(submit.submit_job(request))


@launch_app.command("local")
def launch_local(
    config_file: _ConfigFile,
    overrides: _Overrides = None,
    attempts: Annotated[int, typer.Option(min=1, max=1000, help="how often the run is started at most")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run that the folder holds")] = False,
) -> None:
    """Run `train` here under the conductor: it can be stopped by file, and resumes after a crash."""
    sys.exit(_import("local_job").run_local(config_file, overrides or [], attempts=attempts, resume=resume))


@launch_app.command("status")
def launch_status(
    run: _Run, as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False
) -> None:
    """Print what a run is doing, its attempts, and why they ended."""
    status = _import("status")
    found = status.read_status(status.find_run(run))
    print(json.dumps(found) if as_json else "\n".join(status.status_lines(found)))


@launch_app.command("logs")
def launch_logs(
    run: _Run,
    role: Annotated[str, typer.Option(help="trainer, engine, engine-N, preflight or conductor")] = "trainer",
    attempt: Annotated[str, typer.Option(help="number of the attempt")] = "latest",
    node: Annotated[str | None, typer.Option(help="only logs of this node")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on with what is appended")] = False,
) -> None:
    """Print the logs of a role."""
    status = _import("status")
    status.print_logs(status.find_run(run), role, attempt, node, follow=follow)


@launch_app.command("attach")
def launch_attach(run: _Run, node: Annotated[str | None, typer.Option(help="node of the job")] = None) -> None:
    """Open a shell on a node of a running job, outside of containers."""
    status = _import("status")
    command = status.attach_command(status.find_run(run), node)
    os.execvp(command[0], command)


@launch_app.command("cancel")
def launch_cancel(
    run: _Run,
    save: Annotated[bool, typer.Option("--save", help="let the trainer write a checkpoint first")] = False,
    patience: Annotated[float, typer.Option(min=0, help="seconds to wait for that checkpoint")] = 600.0,
) -> None:
    """Cancel a run, and the jobs that would go on with it."""
    status = _import("status")
    folder = status.find_run(run)
    print(f"{folder}: {status.cancel_run(folder, save=save, patience_s=patience)}")


@launch_app.command("preflight")
def launch_preflight(
    profile: _Profile,
    settings: _Settings = None,
    nodes: Annotated[int, typer.Option(min=1, help="number of nodes")] = 1,
    folder: Annotated[Path | None, typer.Option(help="a folder that the nodes share; default: the profile's")] = None,
    bandwidth: Annotated[
        int, typer.Option(metavar="MIB", min=0, max=4096, help="also measure with messages of this size, such as 64")
    ] = 0,
) -> None:
    """Look at nodes of a cluster: clocks, disks, GPUs, versions, ports, names, and the shared folder."""
    run = _import("preflight_job").run_preflight
    sys.exit(run(profile, settings or [], nodes, folder, bandwidth_mb=bandwidth))


def _import(module: str) -> Any:
    return importlib.import_module(f"megatron_rl.launch.{module}")
