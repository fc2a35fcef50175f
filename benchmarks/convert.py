"""How fast conversions are, against a copy of the same bytes, and how much memory they take.

Writes a random Llama of about SIZE GB (bfloat16), then in each round, in random order: `cp` with a sync, the conversion
to torch_dist, and the conversion back, with JOBS processes. Each runs as a process of its own, whose peak memory counts
(`ru_maxrss` of it and its children, so the largest single process). Then `verify` against `sha256sum`, and `inspect` of
a folder of many shards, whose number is printed. Ratios are medians of rounds, of seconds by the clock and of CPU time:
beside other load the clock says how long a process waits for a core, and CPU time how much work it does.

    python benchmarks/convert.py [--size 2.5] [--rounds 3] [--jobs 2] [--folder DIR]
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from megatron_rl.weights.families import read_family
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.hf_model import check_folder
from megatron_rl.weights.name_table import entries

COMMAND = [sys.executable, "-m", "megatron_rl", "convert"]


def write_model(folder: Path, gigabytes: float) -> int:
    """Write a random Llama with 256-MB shards. Return its bytes."""
    hidden, layers = 2048, max(1, round((gigabytes * 1e9 / 2 - 2 * 32000 * 2048) / 60e6))
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
        dtype=torch.bfloat16,
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    family, shape = read_family(json.loads((folder / "config.json").read_text()), str(folder))
    places: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    written = 0

    def flush() -> None:
        file = f"model-{len(set(places.values())):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, file))
        shard.clear()

    for entry in entries(family, shape):
        for name, size in zip(entry.rule.hf, entry.rule.layout.shapes, strict=True):
            shard[name] = torch.randn(size).mul_(0.02).bfloat16()
            written += shard[name].nbytes
        if sum(tensor.nbytes for tensor in shard.values()) > 256e6:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    check_folder(HFFolder(folder))
    return written


def write_shards(model: Path, out: Path, count: int = 163) -> None:
    """Write the same tensors into `count` shards, as many as DeepSeek-V3 has."""
    source = HFFolder(model)
    names = list(source.tensors)
    places = {name: f"model-{number % count:05d}.safetensors" for number, name in enumerate(names)}
    out.mkdir()
    for file in sorted(set(places.values())):
        save_file({name: source.read(name) for name in names if places[name] == file}, out / file)
    shutil.copyfile(model / "config.json", out / "config.json")
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@dataclass(frozen=True)
class Ran:
    """What a command took: seconds, CPU seconds of it and its children, and peak memory of its largest process, GB."""

    seconds: float
    cpu: float
    peak: float


def timed(command: Sequence[str]) -> Ran:
    """Run a command, and return what it took."""
    os.sync()
    program = (
        "import resource, subprocess, sys, time\n"
        "began = time.perf_counter()\n"
        "code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9)\n"
        "sys.exit(code)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program, *command], check=True, stdout=subprocess.PIPE, text=True)
    return Ran(*map(float, ran.stdout.split()))


def copy_with_sync(source: Path, target: Path) -> list[str]:
    return ["sh", "-c", f"cp -r --reflink=never {source} {target} && sync -f {target}"]


def measure(folder: Path, size: float, rounds: int, jobs: int) -> None:
    model, dist, back = folder / "model", folder / "dist", folder / "back"
    nbytes = write_model(model, size) / 1e9
    print(f"{nbytes:.2f} GB, {jobs} jobs, {os.cpu_count()} cores, {rounds} rounds")
    options = ["--jobs", str(jobs), "--shard-size", "0.5"]
    ways = {
        "cp and sync": (folder / "copy", copy_with_sync(model, folder / "copy")),
        "to-megatron": (dist, [*COMMAND, "to-megatron", str(model), str(dist), *options]),
        "to-hf": (back, [*COMMAND, "to-hf", str(dist), str(back), "--like", str(model), *options]),
    }
    took: dict[str, list[Ran]] = {name: [] for name in ways}
    timed(ways["to-megatron"][1])  # the source of to-hf, and warm page caches
    for _ in range(rounds):
        for name in random.sample(list(ways), len(ways)):
            out, command = ways[name]
            if name == "to-megatron":
                command = [argument.replace(str(dist), str(folder / "dist2")) for argument in command]
                out = folder / "dist2"
            shutil.rmtree(out, ignore_errors=True)
            took[name].append(timed(command))
            if name != "to-hf":
                shutil.rmtree(out, ignore_errors=True)
    for name, found in took.items():
        pairs = list(zip(found, took["cp and sync"], strict=True))
        clock, cpu = (statistics.median(getattr(ran, key) for ran in found) for key in ("seconds", "cpu"))
        of_clock, of_cpu = (
            statistics.median(getattr(a, k) / getattr(b, k) for a, b in pairs) for k in ("seconds", "cpu")
        )
        peak = max(ran.peak for ran in found)
        print(
            f"{name:>12}: {clock:6.1f} s  {nbytes / clock:.2f} GB/s  {of_clock:.2f} x cp, "
            f"CPU {cpu:5.1f} s  {of_cpu:.2f} x cp, peak {peak:.2f} GB, load {os.getloadavg()[0]:.0f}"
        )
    check = timed([*COMMAND, "verify", str(back), "--jobs", str(jobs)])
    sums = timed(["sh", "-c", f"ls {back}/*.safetensors | xargs -P {jobs} -n 1 sha256sum"])
    print(
        f"{'verify':>12}: {nbytes / check.seconds:.2f} GB/s, {sums.seconds / check.seconds:.2f} of sha256sum; "
        f"CPU {check.cpu:.1f} s, sha256sum {sums.cpu:.1f} s"
    )
    many = folder / "many"
    write_shards(model, many)
    alone = timed([sys.executable, "-c", "import torch"])
    inspected = timed([*COMMAND, "inspect", str(many)])
    print(
        f"{'inspect':>12}: {inspected.seconds:.2f} s, CPU {inspected.cpu:.2f} s, for {len(list(many.glob('*.saf*')))} "
        f"shards; importing torch alone {alone.seconds:.2f} s, CPU {alone.cpu:.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=2.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure(Path(folder), arguments.size, arguments.rounds, arguments.jobs)


if __name__ == "__main__":
    main()
