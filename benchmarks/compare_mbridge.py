"""Comparison of conversions with mbridge's, name by name and byte by byte, and of the seconds that both take.

For each family that mbridge has, toy models of `tests/families.py` become parameters of megatron-core under TP1 and
TP2. The library under `.mbridge` makes Hugging Face tensors of them with its own code, and parameters of the tensors.
Both directions must give our bytes: SHA-256 by name. Then parameters in another order must give other bytes, so that
the comparison can fail. The toy models are written by transformers 5, and mbridge needs transformers 4, so it runs in a
process of its own.

    make mbridge          # or: python benchmarks/compare_mbridge.py [--size 0.3] [--rounds 3]
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.convert.convert import Options, to_hf, to_megatron
from megatron_rl.convert.sources import open_source
from megatron_rl.convert.verify import read_manifest
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.hf_model import HFModel, check_folder
from megatron_rl.weights.layouts import QKV, Replicated, RowParallel
from megatron_rl.weights.megatron_keys import LATENT_NORMS
from megatron_rl.weights.name_table import Entry, entries
from megatron_rl.weights.write_folder import write_hf_folder

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / ".mbridge"
# Name of the toy model -> keys of its configuration. mbridge's table of Qwen3-MoE has no dense layers. The tied model
# comes last: mbridge notes the tying in a table that its classes share.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 3": ("llama3", {}),
    "Qwen2, untied": ("qwen2", {"tie_word_embeddings": False}),
    "Qwen3": ("qwen3_yarn", {}),
    "Qwen3-MoE": ("qwen3_moe_dense_layer", {"mlp_only_layers": []}),
    "Mixtral": ("mixtral", {}),
    "GLM-4.5": ("glm4_moe", {}),
    "DeepSeek-V3": ("deepseek_v3", {}),
    "Moonlight": ("moonlight", {}),
    "Qwen2, tied": ("qwen2", {}),
}
Named = dict[str, str]


def sha256(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes."""
    content = tensor.detach().contiguous()
    digest = hashlib.sha256(f"{content.dtype} {list(content.shape)} ".encode())
    digest.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Other:
    """mbridge's conversion of single parameters, for one model and one number of tensor-parallel ranks.

    Args:
        folder: the model, a Hugging Face folder.
        ranks: number of tensor-parallel ranks.
    """

    def __init__(self, folder: HFModel, ranks: int) -> None:
        from mbridge import AutoBridge  # in the process with .mbridge alone
        from mbridge.core.parallel_states import ParallelStates
        from mbridge.models.deepseek_v3 import DeepseekV3Bridge
        from megatron.core.transformer import MLATransformerConfig

        def with_known_keys(**keys: Any) -> Any:
            known = {field.name for field in dataclasses.fields(MLATransformerConfig)}
            return MLATransformerConfig(**{key: value for key, value in keys.items() if key in known})

        # mbridge gives an older megatron-core's keys for RoPE, which conversions do not use.
        DeepseekV3Bridge.TransformerConfigClass = staticmethod(with_known_keys)
        self._norms = LATENT_NORMS if folder.shape.latent is not None else {}
        dtype = next(iter(folder.dtypes.values()))
        parallel = ParallelStates(tp_size=ranks, etp_size=1)
        self._bridge = AutoBridge.from_pretrained(
            str(folder.path), parallel_states=parallel, dtype=dtype, make_vocab_size_divisible_by=ranks
        )
        # Building its model does this.
        self._bridge.vocab_size = folder.shape.vocab_size
        self._bridge.padded_vocab_size = -(-folder.shape.vocab_size // ranks) * ranks

    def to_hf(self, entry: Entry, shards: list[Tensor]) -> list[tuple[str, Tensor]]:
        """Return its Hugging Face tensors of a parameter, of which each rank has a shard."""
        name, whole = self.name(entry), shards[0]
        if len(shards) > 1 and not isinstance(entry.rule.layout, Replicated):
            # megatron-core marks the parameters of its parallel layers so.
            whole.tensor_model_parallel, whole.partition_dim = True, int(isinstance(entry.rule.layout, RowParallel))
            whole = self._bridge._weight_merge_across_tp(name, shards, whole)
        names, tensors = self._bridge._weight_to_hf_format(name, whole)
        return list(zip(names, tensors, strict=True))

    def to_megatron(self, entry: Entry, tensors: list[Tensor], like: list[Tensor]) -> list[Tensor]:
        """Return its shards of the parameter that belongs to Hugging Face tensors."""
        whole = self._bridge._weight_to_mcore_format(self.name(entry), tensors)
        return list(self._bridge._weight_split_across_tp(self.name(entry), whole, like[0], len(like)))

    def name(self, entry: Entry) -> str:
        """Return the parameter's name under Transformer Engine's layers, which mbridge builds its models of."""
        name = entry.rule.fused or entry.mcore
        for norm, fused in self._norms.items():
            name = name.replace(norm, fused)
        return name


def shards_of(model: HFModel, entry: Entry, ranks: int) -> list[Tensor]:
    """Return the parameter of each tensor-parallel rank."""
    size = entry.cut(ranks)
    return [entry.rule.layout.read(model.readers(entry), rank, size) for rank in range(size)]


def plan_of(model: HFModel) -> list[Entry]:
    return [entry for entry in entries(model.family, model.shape) if entry.rule.exported]


def differing(ours: Named, theirs: Named) -> list[str]:
    """Return the names that only one side has, or whose bytes differ."""
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def compare(folder: Path, ranks: int) -> tuple[int, list[str]]:
    """Return the number of tensors of a model, and what differs in one of the two directions."""
    model = check_folder(HFFolder(folder), tensor_parallel=ranks)
    other = Other(model, ranks)
    ours, theirs, loaded, theirs_loaded = {}, {}, {}, {}
    for entry in plan_of(model):
        shards = shards_of(model, entry, ranks)
        merged = dict(zip(entry.rule.hf, entry.rule.layout.merge(shards), strict=True))
        ours |= {name: sha256(tensor) for name, tensor in merged.items()}
        theirs |= {name: sha256(tensor) for name, tensor in other.to_hf(entry, shards)}
        loaded |= {f"{entry.mcore} of rank {rank}": sha256(shard) for rank, shard in enumerate(shards)}
        cut = other.to_megatron(entry, list(merged.values()), shards)
        theirs_loaded |= {f"{entry.mcore} of rank {rank}": sha256(shard) for rank, shard in enumerate(cut)}
    assert ours == {name: sha256(model.read(name)) for name in ours}, "our own export differs from the folder"
    return len(ours), differing(ours, theirs) + differing(loaded, theirs_loaded)


def compare_files(folder: Path, scratch: Path) -> list[str]:
    """Return what differs between the files that `convert` writes, and mbridge's tensors of our torch_dist file."""
    with contextlib.redirect_stdout(io.StringIO()):
        to_megatron(folder, scratch / "dist", Options())
        to_hf(scratch / "dist", scratch / "back", folder, Options())
    stated = {name: entry["sha256"] for name, entry in read_manifest(scratch / "back")["tensors"].items()}
    source, other = open_source(scratch / "dist", folder), Other(check_folder(HFFolder(folder)), 1)
    theirs = {}
    for entry in source.entries:
        for name, tensor in other.to_hf(entry, [source.parameter(entry)]):
            theirs[name] = hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
    shutil.rmtree(scratch)
    return differing(stated, theirs)


def control(folder: Path) -> list[str]:
    """Return what differs if the first layer's queries, keys and values lie one after the other, not by groups."""
    model = check_folder(HFFolder(folder))
    entry = next((one for one in plan_of(model) if isinstance(one.rule.layout, QKV)), None)
    if entry is None:  # latent attention has no such parameter: gate and up change places
        entry = next(one for one in plan_of(model) if "linear_fc1" in one.mcore and len(one.rule.hf) == 2)
    tensors = [model.read(name) for name in entry.rule.hf]
    wrong = torch.cat(tensors if isinstance(entry.rule.layout, QKV) else tensors[::-1])
    ours = {name: sha256(tensor) for name, tensor in zip(entry.rule.hf, tensors, strict=True)}
    return differing(ours, {name: sha256(tensor) for name, tensor in Other(model, 1).to_hf(entry, [wrong])})


def timed(make: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of the clock and of the processor that a call takes."""
    began, used = time.perf_counter(), time.process_time()
    make()
    return time.perf_counter() - began, time.process_time() - used


def race(folder: Path, rounds: int) -> None:
    """Print how long both take to export a model under TP2: into memory, and into a folder."""
    from mbridge.core.safetensor_io import SafeTensorIO  # in the process with .mbridge alone

    model = check_folder(HFFolder(folder), tensor_parallel=2)
    held = [(entry, shards_of(model, entry, 2)) for entry in plan_of(model)]
    other, out = Other(model, 2), folder.parent / "exported"

    def ours() -> Iterator[tuple[str, Tensor]]:
        for entry, shards in held:
            yield from zip(entry.rule.hf, entry.rule.layout.merge(shards), strict=True)

    def theirs() -> Iterator[tuple[str, Tensor]]:
        for entry, shards in held:
            yield from ((name, tensor.contiguous()) for name, tensor in other.to_hf(entry, shards))

    def write_theirs() -> None:
        out.mkdir()
        files = SafeTensorIO(str(folder))
        files.save_hf_weight(theirs(), str(out), [])
        files.save_index(str(out))
        subprocess.run(["sync", "-f", str(out)], check=True)

    ways: dict[str, Callable[[], object]] = {
        "ours, in memory": lambda: sum(tensor.nbytes for _, tensor in ours()),
        "mbridge, in memory": lambda: sum(tensor.nbytes for _, tensor in theirs()),
        "ours, folder": lambda: write_hf_folder(out, ours(), model, shard_bytes=256_000_000),
        "mbridge, folder": write_theirs,
    }
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name in random.sample(list(ways), len(ways)):
            took[name].append(timed(ways[name]))
            shutil.rmtree(out, ignore_errors=True)
    print(f"export of {model.nbytes / 1e9:.2f} GB under TP2, {rounds} rounds; ratios are medians of rounds")
    for name, found in took.items():
        base = took[f"mbridge, {name.split(', ')[1]}"]
        ratios = [statistics.median(a[i] / b[i] for a, b in zip(found, base, strict=True)) for i in (0, 1)]
        clock, cpu = (statistics.median(one[i] for one in found) for i in (0, 1))
        print(f"{name:>20}: {clock:7.2f} s ({ratios[0]:.2f} x mbridge), CPU {cpu:6.2f} s ({ratios[1]:.2f} x)")


def compare_all(folder: Path, families: list[str], rounds: int) -> int:
    """Compare the models in a folder. Return the exit code: 1 if anything differs, or if a control does not."""
    wrong = 0
    for name in families:
        place = folder / name.replace(" ", "_")
        for ranks in (1, 2):
            count, bad = compare(place, ranks)
            wrong += len(bad)
            print(f"{name:>14}, TP{ranks}: {count} tensors, {len(bad)} differ {bad[:4] or ''}", flush=True)
        bad, spoiled = compare_files(place, folder / "scratch"), control(place)
        wrong += len(bad) + (not spoiled)
        print(f"{name:>14}, files: {len(bad)} differ {bad[:4] or ''}; control: {len(spoiled)} differ", flush=True)
    if rounds:
        race(folder / "large", rounds)
    return int(wrong > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=0.5, help="GB of the Llama whose export is timed")
    parser.add_argument("--rounds", type=int, default=3, help="of timing; 0: none")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--compare", type=Path, help=argparse.SUPPRESS)  # the second process
    arguments = parser.parse_args()
    if arguments.compare is not None:
        sys.exit(compare_all(arguments.compare, arguments.families, arguments.rounds))
    if not LIBRARY.is_dir():
        sys.exit(f"{LIBRARY.name}/ is missing: run `make mbridge`")
    sys.path.insert(0, str(ROOT))
    from convert import write_model  # transformers 5, which the second process does not have

    from tests.families import make_family

    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.families:
            toy, keys = FAMILIES[name]
            make_family(Path(folder) / name.replace(" ", "_"), toy, **keys)
        if arguments.rounds:
            write_model(Path(folder) / "large", arguments.size)
        paths = [str(LIBRARY), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--compare", folder]
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
