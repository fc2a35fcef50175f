"""`megatron-rl convert`: one function per verb. Exit codes: 0 done, 1 differs, 2 the user's error, 130 interrupted."""

import gc
import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_rl.convert.inspect import BY_PARAMETER, inspect_checkpoint
from megatron_rl.errors import UserError

Source = Annotated[Path, typer.Argument(metavar="SOURCE", help="folder of the checkpoint")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="folder to write; it must not exist")]
Jobs = Annotated[int, typer.Option(help="processes on this machine; 0: one for each core")]
ShardSize = Annotated[float, typer.Option(help="largest size of an output file, in GB (1e9 bytes)")]
Dtype = Annotated[str, typer.Option(help="keep, fp32, bf16 or fp16")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check everything, print the plan, write nothing")]
Restart = Annotated[bool, typer.Option("--restart", help="remove an unfinished conversion instead of going on")]
LikeFolder = Annotated[Path | None, typer.Option("--like", help="Hugging Face folder of the same model")]

app = typer.Typer(help="Convert, inspect and verify checkpoints.", no_args_is_help=True)


@app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(help="folder of a checkpoint")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    tensors: Annotated[str, typer.Option(help="also list tensors with such names, as '*.layers.0.*'")] = "",
) -> None:
    """Say what a checkpoint is, and whether it can be converted. Reads headers and indices alone."""
    gc.freeze()  # collections would walk all of torch, while a large model's 90,000 names and shapes are made
    report = inspect_checkpoint(path, tensors)
    print(json.dumps(report.as_json(), indent=1) if as_json else "\n".join(report.lines()))
    if report.refused:
        raise typer.Exit(2)


@app.command("to-megatron")
def convert_to_megatron(
    source: Source,
    out: Out,
    dtype: Dtype = "keep",
    jobs: Jobs = 0,
    shard_size: ShardSize = 5.0,
    dry_run: DryRun = False,
    restart: Restart = False,
) -> None:
    """Write Megatron's torch_dist checkpoint from a Hugging Face folder. It loads under any layout."""
    from megatron_rl.convert.convert import to_megatron  # torch's checkpoints take seconds to import

    to_megatron(source, out, _options(jobs, shard_size, dtype, dry_run, restart))


@app.command("to-hf")
def convert_to_hf(
    source: Source,
    out: Out,
    like: LikeFolder = None,
    dtype: Dtype = "keep",
    quantize: Annotated[str, typer.Option(help="none, fp8_blockwise or fp8_blockwise_pow2")] = "none",
    jobs: Jobs = 0,
    shard_size: ShardSize = 5.0,
    dry_run: DryRun = False,
    restart: Restart = False,
) -> None:
    """Write a Hugging Face folder from a torch_dist checkpoint, a run folder, or a folder in another form or dtype."""
    from megatron_rl.convert.convert import to_hf  # torch's checkpoints take seconds to import

    to_hf(source, out, like, _options(jobs, shard_size, dtype, dry_run, restart, quantize))


@app.command("reshard")
def reshard_command(source: Source) -> None:
    """Say how a checkpoint loads under another layout."""
    report = inspect_checkpoint(source)
    if report.refused:
        raise UserError(f"{source}: {report.refused}")
    if report.kind != "a torch_dist checkpoint":
        raise UserError(
            f"{source} is {report.kind}, which has no layout: `convert to-megatron` writes one that has none"
        )
    if not report.optimizer:
        print(f"{source} holds weights only: load it under any layout, nothing to do")
        return
    if report.optimizer != BY_PARAMETER:
        raise UserError(
            f"{source}: the weights load under any layout, and the optimizer's state ({report.optimizer}) does not: it "
            "is bound to the writer's layout. Load it there with the Megatron-LM that wrote it, and save it with "
            "--dist-ckpt-optim-fully-reshardable; or convert the weights alone, `convert to-hf`"
        )
    print(f"{source}: weights and optimizer's state load under any layout, nothing to do")


@app.command("verify")
def verify_command(
    a: Annotated[Path, typer.Argument(metavar="A", help="folder of a checkpoint")],
    b: Annotated[Path | None, typer.Argument(metavar="[B]", help="another, to compare it with")] = None,
    like: LikeFolder = None,
    logits: Annotated[
        int, typer.Option(help="also compare the logits of so many random tokens with transformers; A is a HF folder")
    ] = 0,
    jobs: Jobs = 0,
) -> None:
    """Compare every tensor of A with its manifest, or with B. The exit code is 1 if anything differs."""
    from megatron_rl.convert.verify import verify_manifest, verify_pair  # torch's checkpoints take seconds to import

    began, workers = time.perf_counter(), _processes(jobs)
    verdict = verify_manifest(a, like, workers) if b is None else verify_pair(a, b, like, workers)
    for line in verdict.differences[:20]:
        print(f"differs: {line}")
    if len(verdict.differences) > 20:
        print(f"differs: {len(verdict.differences) - 20} more")
    rate = verdict.nbytes / 1e9 / (time.perf_counter() - began)
    print(f"{verdict.compared} tensors compared, {len(verdict.differences)} differ ({rate:.2f} GB/s)")
    same = verdict.same
    if logits:
        from megatron_rl.convert.compare_logits import compare_logits  # builds two models: torch and megatron-core

        found = compare_logits(a, logits)
        print(found.line())
        same = same and found.equal
    if not same:
        raise typer.Exit(1)


def _options(jobs: int, shard_size: float, dtype: str, dry_run: bool, restart: bool, quantize: str = "none") -> Any:
    from megatron_rl.convert.convert import Options, parse_dtype  # torch's checkpoints take seconds to import

    if shard_size <= 0:
        raise UserError(f"--shard-size is {shard_size}: it must be positive")
    return Options(_processes(jobs), int(shard_size * 1e9), parse_dtype(dtype), quantize, restart, dry_run)


def _processes(jobs: int) -> int:
    """Return the number of processes that `--jobs` asks for."""
    if jobs < 0:
        raise UserError(f"--jobs is {jobs}: it must be positive, or 0 for one on each core")
    return jobs or len(os.sched_getaffinity(0))
