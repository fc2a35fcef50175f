"""Writing of a Hugging Face folder, shard after shard.

A folder is written under a temporary name next to its destination and gets its final name only when it is complete.
"""

import contextlib
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_rl.errors import CheckpointError, StorageError
from megatron_rl.weights.digest import tensor_digest
from megatron_rl.weights.hf_folder import INDEX, MANIFEST, SINGLE, ModelFiles

_QUANTIZATION_RECORD = "hf_quant_config.json"  # written by NVIDIA ModelOpt
_VALUES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def write_hf_folder(
    dest: Path | str,
    tensors: Iterable[tuple[str, Tensor]],
    source: ModelFiles,
    *,
    shard_bytes: int = 5 * 2**30,
    manifest_version: int | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Write a complete model folder: shards, index, the source's assets, and config.json with the true dtype.

    Shards are streamed: at most `shard_bytes` of tensors (or one larger tensor) are in memory at a time. `dest` appears
    only when every file is complete. An existing model folder there is replaced by two renames; anything else is
    refused.

    Args:
        dest: the folder to write.
        tensors: (name, tensor) pairs.
        source: the folder whose assets and config.json are used.
        shard_bytes: maximum bytes of tensors in one shard.
        manifest_version: if given, manifest.json is written as {"version", "tensors": {name: digest}}.
        quantization: the `quantization_config` of config.json, for tensors that are codes and scales.

    Returns:
        name -> digest.

    Raises:
        CheckpointError: if `dest` exists and is not a model folder, or if a tensor appears twice.
    """
    dest = Path(dest)
    if dest.exists() and not (dest.is_dir() and ((dest / "config.json").is_file() or not any(dest.iterdir()))):
        raise CheckpointError(f"{dest} exists and is not a model folder: choose another destination or remove it")
    dest.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(dest)
    temporary = Path(tempfile.mkdtemp(prefix=_unfinished(dest), dir=dest.parent))
    held = _hold(temporary)
    try:
        # mkdtemp makes a private folder. Users who may read the parent may also read the model.
        temporary.chmod(dest.parent.stat().st_mode & 0o755)
        digests, dtypes = _write_shards(temporary, tensors, shard_bytes)
        _copy_assets(source, temporary, quantization is not None)
        _write_config(source, temporary, dtypes, quantization)
        if manifest_version is not None:
            _write_json(temporary / MANIFEST, {"version": manifest_version, "tensors": digests})
        _give_usual_modes(temporary)
        _replace(temporary, dest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(held)
    return digests


def _unfinished(dest: Path) -> str:
    return f".{dest.name}.writing-"


def _hold(folder: Path) -> int:
    """Lock a folder until the returned descriptor is closed, or this process ends in any way."""
    descriptor = os.open(folder, os.O_RDONLY)
    # A file system without locks cannot show that a writer ended. What killed writers left is kept there.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _remove_abandoned(dest: Path) -> None:
    """Remove the temporary folders of earlier writers of `dest` that were killed."""
    for folder in dest.parent.glob(f"{glob.escape(_unfinished(dest))}*"):
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:  # it has just been renamed or removed, or belongs to another user
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # its writer lives
            continue
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int
) -> tuple[dict[str, str], dict[str, tuple[torch.dtype, int]]]:
    """Write the shards and, if there is more than one, their index.

    Return name -> digest and name -> (dtype, bytes).
    """
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    sizes: dict[str, tuple[torch.dtype, int]] = {}

    def flush() -> None:
        file = folder / f"{len(shards)}.part"
        try:
            save_file(shard, file, metadata={"format": "pt"})
        except (SafetensorError, OSError) as error:
            wanted, free = sum(tensor.nbytes for tensor in shard.values()), shutil.disk_usage(folder).free
            place = folder.with_name(folder.name.removeprefix(".").partition(".writing-")[0])
            raise StorageError(
                f"a shard of {wanted} bytes cannot be written to {place} ({error}): {free} bytes are free there; "
                "free space there, or choose another place"
            ) from error
        shards.append(list(shard))
        shard.clear()

    held = 0
    for name, tensor in tensors:
        if name in digests:
            raise CheckpointError(f"tensor '{name}' is written twice: an export must give every name once")
        if shard and held + tensor.nbytes > shard_bytes:
            flush()
            held = 0
        shard[name] = tensor.detach().cpu().contiguous()
        held += tensor.nbytes
        digests[name] = tensor_digest(shard[name])
        sizes[name] = (tensor.dtype, tensor.nbytes)
    if not shard:
        raise CheckpointError(f"nothing to write to {folder}: the export gave no tensors")
    flush()
    _name_shards(folder, shards, sum(nbytes for _, nbytes in sizes.values()))
    return digests, sizes


def _name_shards(folder: Path, shards: list[list[str]], total_size: int) -> None:
    if len(shards) == 1:
        (folder / "0.part").rename(folder / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    _write_json(
        folder / INDEX, {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    )


def _copy_assets(source: ModelFiles, folder: Path, quantized: bool) -> None:
    for asset in source.assets:
        if asset.name == _QUANTIZATION_RECORD and not quantized:
            continue
        (folder / asset).parent.mkdir(exist_ok=True)
        shutil.copyfile(source.path / asset, folder / asset)


def _write_config(
    source: ModelFiles,
    folder: Path,
    written: Mapping[str, tuple[torch.dtype, int]],
    quantization: Mapping[str, Any] | None,
) -> None:
    """Write the dtype that holds most of the bytes into config.json, if writing changed any tensor's dtype.

    In a quantized folder this is the dtype of the unquantized tensors, because it is the dtype to compute in. The
    source's `quantization_config` is left out: it does not describe what was written.
    """
    if quantization is not None:
        written = {name: entry for name, entry in written.items() if name in source.tensors and entry[0] in _VALUES}
    changed = any(
        name in source.tensors and source.tensors[name].dtype != dtype for name, (dtype, _) in written.items()
    )
    kept = {key: value for key, value in source.config.items() if key != "quantization_config"}
    added = {} if quantization is None else {"quantization_config": dict(quantization)}
    if not changed and kept | added == source.config:
        return
    weight: dict[torch.dtype, int] = {}
    for dtype, nbytes in written.values():
        weight[dtype] = weight.get(dtype, 0) + nbytes
    # transformers 4 wrote torch_dtype, 5 writes dtype. Both may be present, and then both must be correct.
    keys = [key for key in ("dtype", "torch_dtype") if key in source.config] or ["dtype"]
    name = str(max(weight, key=lambda dtype: weight[dtype])).removeprefix("torch.")
    named = dict.fromkeys(keys, name) if changed or added else {}
    _write_json(folder / "config.json", kept | named | added)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _give_usual_modes(folder: Path) -> None:
    """Give every file the mode of a newly created one. safetensors writes files that only their owner may read."""
    usual = (folder / "config.json").stat().st_mode
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(usual)


def _replace(temporary: Path, dest: Path) -> None:
    """Rename the complete folder to its final name.

    The folder that it replaces stays next to it until the rename has succeeded.
    """
    for file in temporary.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    if not dest.exists():
        temporary.rename(dest)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{dest.name}.replaced-", dir=dest.parent))
    try:
        dest.rename(aside / dest.name)
        try:
            temporary.rename(dest)
        except OSError:
            (aside / dest.name).rename(dest)
            raise
    finally:
        shutil.rmtree(aside)
