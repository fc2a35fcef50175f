"""The command line: one function per command. Each command imports the heavy modules it needs, so `--help` is fast."""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from megatron_rl.config import Config, load_config
from megatron_rl.errors import ConfigError, ExitCode, MegatronRLError, UserError, exit_code, is_lost_peer
from megatron_rl.forking import write_whole_lines
from megatron_rl.launch.launch_commands import launch_app
from megatron_rl.launch.ranks import one_thread, run_ranks, under_launcher
from megatron_rl.study.study_commands import study_app
from megatron_rl.supervise import ignore_stops

app = typer.Typer(
    name="megatron-rl",
    help="Reinforcement learning of language models on megatron-core and SGLang.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(launch_app, name="launch", no_args_is_help=True)
app.add_typer(study_app, name="study", no_args_is_help=True)
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; see configs/")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="dotted overrides")]


def main() -> None:
    """Run the command line. The exit code is an `ExitCode`; a MegatronRLError is printed as one paragraph."""
    write_whole_lines()
    try:
        app()
    except MegatronRLError as error:
        if os.environ.get("RANK", "0") == "0" or not error.everywhere:
            _say_error(f"{type(error).__name__}: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        if under_launcher():
            ignore_stops()  # a launcher that ends all ranks when one has ended must not change the code of rank 0
        sys.exit(ExitCode.INTERRUPTED)
    except Exception as error:
        code = exit_code(error)
        if code == ExitCode.CRASH:
            raise
        traceback.print_exc()
        if is_lost_peer(error):
            _say_error("another rank of the run is gone, and this one ends because of it; go on with --resume")
        sys.exit(code)


def _say_error(text: str) -> None:
    rank = os.environ.get("RANK", "0")
    print(f"{'' if rank == '0' else f'rank {rank}: '}{text}", file=sys.stderr, flush=True)


class _TrainCommand(TyperCommand):
    """`--resume` is a flag; `--resume=auto` is another one, because a flag takes no value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, ["--resume-auto" if arg == "--resume=auto" else arg for arg in args])


@app.command(cls=_TrainCommand)
def train(
    config_file: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="continue from the newest valid checkpoint of the run folder; --resume=auto: do so if the folder "
            "holds a run of this configuration, else start; a run that is done ends at once",
        ),
    ] = False,
    resume_auto: Annotated[bool, typer.Option("--resume-auto", hidden=True)] = False,
    accept_changed_code: Annotated[
        bool,
        typer.Option(
            "--accept-changed-code", help="with --resume: go on although your own task, reward or objective changed"
        ),
    ] = False,
) -> None:
    """Train a policy by reinforcement learning. Starts one process per rank unless a launcher already did."""
    # The configuration in a run folder may come from a version with other key names.
    own_file = (resume or resume_auto) and config_file.with_name("log.jsonl").is_file()
    config = load_config(config_file, overrides, accept_old_keys=own_file)
    if resume_auto and _is_done(config):
        return
    if not under_launcher():
        with one_thread():
            folder = _seam("trainer.run_folder")
            resumes = resume or (resume_auto and folder.holds_same_run(config))
            accepts = accept_changed_code and (resumes or not resume_auto)
            folder.check_run_folder(config, resume=resumes, accept_changed_code=accepts)
            _seam("trainer.preflight").check(config)
        flags = {"--resume": resume, "--resume=auto": resume_auto, "--accept-changed-code": accept_changed_code}
        arguments = ["train", str(config_file), *(overrides or []), *(name for name, on in flags.items() if on)]
        forks_servers = config.rollout.engine == "embedded" and config.rollout.own_servers
        sys.exit(run_ranks(arguments, config.parallel.world_size, forks_servers=forks_servers))
    open_run = _seam("trainer.bringup").open_run
    resumes = None if resume_auto else resume
    with open_run(config, resume=resumes, accept_changed_code=accept_changed_code) as trainer:
        algorithm = _seam("algorithms").make_algorithm(trainer.plan.algorithm)
        hooks = _seam("trainer.attribution").attribution_hooks(config)
        try:
            _seam("trainer.loop").train(trainer, algorithm, hooks)
        except KeyboardInterrupt:
            trainer.stop()
            raise


def _is_done(config: Config) -> bool:
    """Return whether the run folder holds this run, done and exported. Rank 0 says so."""
    if not _seam("trainer.run_folder").holds_same_run(config):
        return False
    steps = _seam("trainer.run_control").RunControl(config.run.folder).done_steps()
    if steps is None or steps < config.run.steps:
        return False
    if os.environ.get("RANK", "0") == "0":
        print(f"{config.run.folder} is done: {steps} steps, exported", flush=True)
    return True


@app.command()
def eval(
    config_file: ConfigFile,
    overrides: Overrides = None,
) -> None:
    """Print held-out greedy and sampled pass rates of `model.path`, without training."""
    config = load_config(config_file, overrides)
    _seam("trainer.evaluate").evaluate_model(config)


@app.command()
def serve(
    model: Annotated[Path, typer.Option(help="Hugging Face folder")],
    host: Annotated[
        str, typer.Option(help="address to listen on; other than loopback with --api-key-file")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")] = 30000,
    dtype: Annotated[str, typer.Option(help="dtype of the engine: fp32, bf16 or fp16")] = "fp32",
    quantization: Annotated[
        str, typer.Option(help="of the weights: none, fp8_blockwise, fp8_blockwise_pow2, int8, mxfp8 or nvfp4")
    ] = "none",
    activations: Annotated[
        str, typer.Option(help="none, fp8, or fp4 (with nvfp4): also quantize the inputs of quantized layers")
    ] = "none",
    trainer_dtype: Annotated[
        str, typer.Option(help="dtype of the trainer; weights are rounded to it before they are quantized")
    ] = "bf16",
    first_last_bf16: Annotated[
        bool, typer.Option("--first-last-bf16", help="do not quantize the first and the last layer")
    ] = False,
    threads: Annotated[int, typer.Option(min=0, max=4096, help="number of torch threads; 0: torch's default")] = 0,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="every request is its own batch")] = False,
    weight_version: Annotated[str, typer.Option(help="version name of the loaded weights")] = "default",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    max_rows: Annotated[int, typer.Option(min=1, help="maximum number of samples decoded together")] = 512,
    api_key_file: Annotated[
        Path | None, typer.Option(help="file (mode 600) with a key that every request must carry, but /health")
    ] = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="file to write once the server responds (JSON: url, pid, host, version)")
    ] = None,
    save_dir: Annotated[
        list[Path] | None, typer.Option(help="folder below which /save_weights may write; may be repeated")
    ] = None,
    parent_pid: Annotated[int, typer.Option(min=0, help="end with this parent; 0: keep running", hidden=True)] = 0,
) -> None:
    """Serve a model with the embedded engine over SGLang's HTTP contract. SGLang has its own `sglang.launch_server`."""
    options = _seam("protocol.server_options")
    quantized = options.parse_quantization(quantization, activations, first_last_bf16, trainer_dtype)
    _seam("server.app").run_server(
        options.ServerOptions(
            model=model,
            host=host,
            port=port,
            dtype=dtype,
            threads=threads,
            deterministic=deterministic,
            weight_version=weight_version,
            device=device,
            max_rows=max_rows,
            parent_pid=parent_pid,
            quantization=quantized,
            api_key_file=api_key_file,
            ready_file=ready_file,
            save_dirs=tuple(save_dir or ()),
        )
    )


@app.command()
def report(run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="run folder with a log.jsonl")]) -> None:
    """Write report/index.html of a run from its log and configuration."""
    print(_seam("report").write_report(run_folder))


@app.command()
def attribute(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run that has ended or stopped")],
    prompts: Annotated[int, typer.Option(min=1, help="number of responses to score, one per prompt")] = 16,
    layers: Annotated[
        bool, typer.Option("--layers", help="also compare hidden states layer by layer; for one rank only")
    ] = False,
    sampled_by: Annotated[
        int | None,
        typer.Option(min=0, metavar="STEP", help="step of the kept checkpoint that samples; default: the newest"),
    ] = None,
) -> None:
    """Report where the mismatch between trainer and engine comes from: kernels, precisions, weight sync, staleness."""
    source = run_folder / "config.yaml"
    if not source.is_file():
        raise UserError(f"{run_folder} is not the folder of a run: it has no config.yaml")
    place = [f"run.dir={json.dumps(str(run_folder.parent))}", f"run.name={json.dumps(run_folder.name)}"]
    config = load_config(source, place, accept_old_keys=True)
    if not under_launcher():
        if layers:
            with one_thread():
                _seam("attribution.hidden").check_one_rank(config.parallel.world_size)
        flags = ["--prompts", str(prompts), *(["--layers"] if layers else [])]
        flags += [] if sampled_by is None else ["--sampled-by", str(sampled_by)]
        sys.exit(run_ranks(["attribute", str(run_folder), *flags], config.parallel.world_size))
    _seam("trainer.attribution").attribute_run(config, prompts=prompts, layers=layers, sampled_by=sampled_by)


@app.command()
def doctor(
    config_file: Annotated[
        Path | None, typer.Option("--config", help="also check whether this configuration can run")
    ] = None,
    sync_file: Annotated[
        Path | None,
        typer.Option(
            "--sync",
            help="start this configuration's trainer and engines, make no update, and compare their log-probabilities; "
            "exit code 1 if they disagree",
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print what this machine supports, and check a configuration. Without --sync, starts and writes nothing."""
    if sync_file is not None:
        if config_file is not None:
            raise ConfigError("give --config or --sync: --sync checks the configuration, too")
        _check_sync(sync_file, overrides)
    if overrides and config_file is None:
        raise ConfigError(f"override '{overrides[0]}' has no configuration to go with: give one with --config")
    config = None if config_file is None else load_config(config_file, overrides)
    _seam("doctor").print_report()
    if config is not None:
        _seam("plan").print_plan(_seam("trainer.preflight").check(config), config)
        print(f"{config_file}: can run")


def _check_sync(config_file: Path, overrides: list[str] | None) -> NoReturn:
    """Run `doctor --sync` on every rank, and exit with 0 if trainer and engines agree, else with 1."""
    config = load_config(config_file, overrides)
    if not under_launcher():
        with one_thread():
            _seam("trainer.preflight").check(config)
        arguments = ["doctor", "--sync", str(config_file), *(overrides or [])]
        forks_servers = config.rollout.engine == "embedded" and config.rollout.own_servers
        sys.exit(run_ranks(arguments, config.parallel.world_size, forks_servers=forks_servers))
    sys.exit(ExitCode.DONE if _seam("trainer.sync_check").check_sync(config) else ExitCode.CRASH)


@app.command("config")
def print_config(
    config_file: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file; see configs/")] = None,
    overrides: Overrides = None,
    defaults: Annotated[bool, typer.Option("--defaults", help="print the defaults of all keys instead")] = False,
) -> None:
    """Print a configuration with all its keys as YAML, with their descriptions as comments."""
    if defaults == (config_file is not None):
        raise ConfigError("give either a configuration file or --defaults")
    config = None if config_file is None else load_config(config_file, overrides)
    print(_seam("reference").config_yaml(config), end="")


@app.command()
def warmup(
    config_file: ConfigFile,
    dest: Annotated[Path, typer.Option(help="Hugging Face folder to write")],
    overrides: Overrides = None,
    target: Annotated[float, typer.Option(min=0, max=1, help="held-out pass rate at which to stop")] = 0.4,
    error_rate: Annotated[float, typer.Option(min=0, max=1, help="share of demonstrations with one wrong digit")] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1, help="problems per update")] = 200,
    max_updates: Annotated[int, typer.Option(min=1, help="number of updates after which to fail")] = 1000,
) -> None:
    """Train `model.path`, supervised, on the task's own solutions until it solves some of them."""
    config = load_config(config_file, overrides)
    if not under_launcher():
        options = {
            "dest": dest,
            "target": target,
            "error-rate": error_rate,
            "batch-size": batch_size,
            "max-updates": max_updates,
        }
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        arguments = ["warmup", str(config_file), *flags, *(overrides or [])]
        sys.exit(run_ranks(arguments, config.parallel.world_size))
    rate = _seam("sft").warm_up(
        config, dest, target=target, error_rate=error_rate, batch_size=batch_size, max_updates=max_updates
    )
    if os.environ["RANK"] == "0":
        print(f"warmed up to a held-out pass rate of {rate:.1%}: {dest}")


@app.command()
def quickstart(
    folder: Annotated[Path, typer.Option(help="folder for the models and the run")] = Path("runs"),
    config_dir: Annotated[Path, typer.Option(help="folder with warmup.yaml and quickstart.yaml")] = Path("configs"),
) -> None:
    """Build a small model, warm it up, train it by RL at TP2, and write a report. Takes minutes on a laptop."""
    _seam("quickstart").run_quickstart(folder, config_dir)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
    rich_help_panel="Commands",
)
def convert(context: typer.Context) -> None:
    """Convert, inspect and verify checkpoints. See `megatron-rl convert --help`."""
    # torch asks the kernel for large pages. With small ones, fresh memory costs as much CPU time as writing a file.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    verbs = _seam("convert.verbs").app
    sys.exit(verbs(context.args, prog_name="megatron-rl convert", standalone_mode=False) or 0)


def _seam(module: str) -> Any:
    """Import a heavy module of this package. Commands import such modules only through this function."""
    return importlib.import_module(f"megatron_rl.{module}")
