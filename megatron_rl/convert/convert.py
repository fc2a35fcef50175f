"""The two conversions: into a Hugging Face folder, and into a `torch_dist` checkpoint."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

import megatron_rl
from megatron_rl.convert.codes import Coder
from megatron_rl.convert.dist_parts import file_part, plan_files, write_index
from megatron_rl.convert.hf_parts import carried_part, index_text, plan_shards, shard_name, shard_part
from megatron_rl.convert.kinds import TRACKER
from megatron_rl.convert.parts import Destination, Part, PartReport, finished, run_parts
from megatron_rl.convert.progress_bar import Progress
from megatron_rl.convert.sources import HFSource, Like, WeightSource, open_source
from megatron_rl.errors import CheckpointError, UserError
from megatron_rl.weights.hf_folder import INDEX, MANIFEST
from megatron_rl.weights.hf_model import HFModel, check_folder
from megatron_rl.weights.name_table import Entry

FORMAT = 2  # of manifest.json; 1 is that of the folders that engines are sent
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.distcp", ".git", ".cache")
_WAIT_S = 3600.0  # how long the first of several processes waits for the others without progress


@dataclass(frozen=True)
class Options:
    """How a conversion runs.

    Attributes:
        jobs: processes on this machine.
        shard_bytes: largest size of an output file, in bytes.
        dtype: dtype of the written tensors; None: the source's, or that of the `like` folder.
        quantize: `none`, or the format in which a Hugging Face folder has its matrices.
        restart: remove an unfinished conversion instead of going on with it.
        dry_run: check and print the plan, and write nothing.
    """

    jobs: int = 1
    shard_bytes: int = 5 << 30
    dtype: torch.dtype | None = None
    quantize: str = "none"
    restart: bool = False
    dry_run: bool = False


def to_hf(source_path: Path, out: Path, like: Path | None, options: Options) -> None:
    """Write a Hugging Face folder from any kind of checkpoint that is read.

    Args:
        source_path: the checkpoint.
        out: the folder to write.
        like: folder whose configuration, tokenizer, dtypes and other files are taken over; None: the source itself,
            which then is a Hugging Face folder.
        options: how the conversion runs.

    Raises:
        MegatronRLError: before a byte is written, if the conversion cannot be done.
    """
    source = open_source(source_path, like)
    template = Like.open(source_path if like is None else like)
    stored = {name: info.dtype for name, info in source.tensors.items()}
    buffers = {name for entry in source.entries if entry.rule.buffer for name in entry.rule.hf}
    dtypes = {
        name: dtype if name in buffers or options.dtype is None else options.dtype
        for name, dtype in ((name, template.dtype(name, dtype)) for name, dtype in stored.items())
    }
    sizes = {name: info.nbytes // info.dtype.itemsize * dtypes[name].itemsize for name, info in source.tensors.items()}
    carrier = _carrier(source, template)
    more = int(carrier is not None and bool(carrier.carried_tensors))

    def written(entry: Entry) -> int:
        shapes = zip(entry.rule.hf, entry.rule.layout.shapes, strict=True)
        return sum(prod(shape) * dtypes[name].itemsize for name, shape in shapes)

    shards = plan_shards(source.units(), written, options.shard_bytes, more)
    coder = None if options.quantize == "none" else Coder(options.quantize, source)
    parts = [shard_part(shard, source, dtypes, coder) for shard in shards]
    if carrier is not None and more:
        parts.append(carried_part(shard_name(len(shards), len(shards) + 1), carrier))
    places = {name: part.file for part in parts for name in part.names}
    names = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()})
    plan = {
        "to": "hf",
        "dtypes": names,
        "quantize": options.quantize,
        "shards": [part.file for part in parts],
        "like": str(template.path),
    }

    def finish(folder: Path, records: Sequence[PartReport]) -> None:
        if len(parts) > 1:
            name, text = index_text(places, sum(part.nbytes for part in parts))
            (folder / name).write_text(text, encoding="utf-8")
        carried, dropped = _carry(template, folder)
        config = {key: value for key, value in template.config.items() if key != "quantization_config"}
        main = max(set(dtypes.values()), key=lambda dtype: sum(sizes[name] for name in dtypes if dtypes[name] == dtype))
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        named = dict.fromkeys(keys, str(main).removeprefix("torch."))
        added = {} if coder is None else {"quantization_config": coder.config(source.tensors)}
        (folder / "config.json").write_text(json.dumps(config | named | added, indent=2) + "\n", encoding="utf-8")
        dropped += [f"{name} (tensor)" for name in (carrier.unused if carrier else ()) if name not in places]
        _write_manifest(folder, source, plan, records, carried, dropped)

    casts = [name for name, dtype in stored.items() if dtypes[name] != dtype]
    if casts and _share()[0] == 0:
        print(f"{len(casts)} tensors are cast, '{casts[0]}' from {stored[casts[0]]} to {dtypes[casts[0]]} among them")
    destination = Destination(out, _plan(source, plan))
    _convert(source, destination, parts, options, finish, sources=[source_path, template.path])


def to_megatron(source_path: Path, out: Path, options: Options) -> None:
    """Write a `torch_dist` checkpoint root that Megatron loads under any layout: OUT/release and the tracker file.

    Args:
        source_path: the checkpoint, a Hugging Face folder.
        out: the folder to write.
        options: how the conversion runs.

    Raises:
        MegatronRLError: before a byte is written, if the conversion cannot be done.
    """
    source = open_source(source_path, None)
    files = plan_files(source.units(), source.nbytes, options.shard_bytes)
    parts = [file_part(file, source, options.dtype) for file in files]
    dtype = None if options.dtype is None else str(options.dtype).removeprefix("torch.")
    plan = {"to": "torch_dist", "dtype": dtype, "files": [file.file for file in files]}

    def finish(folder: Path, records: Sequence[PartReport]) -> None:
        write_index(folder, files, source, options.dtype, records)
        release = folder / "release"
        release.mkdir(exist_ok=True)
        for path in [folder / name for name in (".metadata", "common.pt", "metadata.json")] + [
            folder / file.file for file in files
        ]:
            path.replace(release / path.name)
        (folder / TRACKER).write_text("release", encoding="utf-8")
        _write_manifest(folder, source, plan, records, [], [])

    _convert(source, Destination(out, _plan(source, plan)), parts, options, finish, sources=[source_path])


def _carrier(source: WeightSource, template: Like) -> HFModel | None:
    """Return the folder whose tensors that are not trained are copied, such as layers of multi-token prediction."""
    if isinstance(source, HFSource):
        return source.model
    return None if template.folder is None else check_folder(template.folder)


def _plan(source: WeightSource, plan: dict[str, Any]) -> dict[str, Any]:
    """Return a plan with what the source is, so that another source is not mixed in."""
    tensors = {name: [list(info.shape), str(info.dtype)] for name, info in source.tensors.items()}
    stamps = sorted((file.name, file.stat().st_size) for file in source.path.iterdir() if file.is_file())
    content = hashlib.sha256(json.dumps([tensors, stamps], sort_keys=True).encode()).hexdigest()
    return {**plan, "source": str(source.path.resolve()), "content": content}


def _convert(
    source: WeightSource,
    destination: Destination,
    parts: list[Part],
    options: Options,
    finish: Any,
    sources: Iterable[Path],
) -> None:
    total, share = sum(part.nbytes for part in parts), _share()
    destination.check(list(sources), total, restart=options.restart)
    if share[0] == 0:
        print(_describe(source, destination.out, parts, total))
    if options.dry_run:
        return
    with destination.opened(restart=options.restart, share=share[0]) as partial:
        with Progress(total // share[1], destination.out.name) as progress:
            run_parts(parts, partial, options.jobs, progress, share)
        if share[0] != 0:
            return
        _wait_for_others(parts, partial)
        records = finished(partial)
        finish(partial, [records[part.file] for part in parts])
    destination.publish()
    print(f"{destination.out}: {total / 1e9:.3g} GB written at {progress.rate / 1e9:.2f} GB/s")


def _share() -> tuple[int, int]:
    """Return (number, count) of this process among those that srun started for one conversion."""
    count = int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_STEP_ID" in os.environ else 1
    return (int(os.environ.get("SLURM_PROCID", "0")), count) if count > 1 else (0, 1)


def _wait_for_others(parts: Sequence[Part], partial: Path) -> None:
    """Wait until the processes of other nodes have finished their parts."""
    seen, since = -1, time.monotonic()
    while (done := len(finished(partial))) < len(parts):
        if done > seen:
            seen, since = done, time.monotonic()
        if time.monotonic() - since > _WAIT_S:
            raise CheckpointError(f"{partial}: {len(parts) - done} files are not finished, and no process writes them")
        time.sleep(1.0)


def _describe(source: WeightSource, out: Path, parts: Sequence[Part], total: int) -> str:
    count = sum(info.nbytes // info.dtype.itemsize for info in source.tensors.values())
    kinds = ", ".join(sorted({str(info.dtype).removeprefix("torch.") for info in source.tensors.values()}))
    largest = max(source.nbytes(entry) for entry in source.entries)
    return (
        f"{source.path}: {source.family.architectures[0]}, {count / 1e9:.3g} B parameters ({kinds})\n"
        f"{out}: {len(parts)} files, {total / 1e9:.3g} GB; memory for each process about {2 * largest / 1e9:.2g} GB"
    )


def _carry(template: Like, folder: Path) -> tuple[list[str], list[str]]:
    """Copy every file of the template that holds no weights. Return what was copied and what was left out."""
    carried, dropped = [], []
    for file in sorted(template.path.rglob("*")):
        name = file.relative_to(template.path)
        if not file.is_file() or str(name) == "config.json":
            continue
        top = name.parts[0]
        weights = any(Path(part).match(pattern) for part in (top, name.name) for pattern in _WEIGHTS)
        stale = name.name in (INDEX, MANIFEST, "hf_quant_config.json") or name.name.endswith(".index.json")
        if weights or stale:
            dropped.append(str(name))
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)
        carried.append(str(name))
    return carried, dropped


def _write_manifest(
    folder: Path,
    source: WeightSource,
    plan: dict[str, Any],
    records: Sequence[PartReport],
    carried: list[str],
    dropped: list[str],
) -> None:
    config = source.path / "config.json"
    tensors = {
        name: {**entry, "file": record["file"]} for record in records for name, entry in record["tensors"].items()
    }
    content = {
        "format": FORMAT,
        "tool": f"megatron_rl {megatron_rl.__version__}",
        "source": {
            "path": str(source.path.resolve()),
            "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None,
        },
        "plan": plan,
        "tensors": tensors,
        "carried": carried,
        "dropped": dropped,
        "casts": sorted(name for name, entry in tensors.items() if "cast_from" in entry or "cast_to" in entry),
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def parse_dtype(name: str) -> torch.dtype | None:
    """Return the dtype of an option, None for `keep`. Raise UserError if it is not known."""
    known = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in known:
        raise UserError(f"--dtype is '{name}'; valid: {', '.join(known)}")
    return known[name]
