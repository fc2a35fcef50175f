"""Each folder of the table of cases is used or refused, as the table says, by the code that a run uses."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.config import ParallelConfig, make_config
from megatron_rl.errors import CheckpointError, MegatronRLError
from megatron_rl.policy import parallel
from megatron_rl.policy.device_port import pick_device
from megatron_rl.weights.hf_folder import SINGLE, HFFolder
from megatron_rl.weights.write_folder import write_hf_folder
from tests.cases.model_folders import CASES, FP8, FolderCase
from tests.models import make_qwen3
from tests.policies import build_planned_policy


@pytest.fixture(scope="module")
def mesh() -> parallel.Mesh:
    return parallel.initialize(ParallelConfig(), pick_device("cpu"), seed=0)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("sound"), tied=False, layers=2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_folder_is_used_or_refused_in_words(
    case: FolderCase, sound: Path, tmp_path: Path, mesh: parallel.Mesh
) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    case.change(folder)
    config = make_config({"model": {"path": str(folder)}})
    if case.refusal is None:
        assert build_planned_policy(config, mesh).shape.num_layers == 2
        return
    with pytest.raises(MegatronRLError, match=f"(?s){case.refusal}") as caught:
        build_planned_policy(config, mesh)
    assert str(folder) in str(caught.value)


def stored(folder: HFFolder) -> Iterator[tuple[str, torch.Tensor]]:
    for name in folder.tensors:
        yield name, folder.read(name)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_every_written_file_has_the_mode_of_a_new_file(sound: Path, tmp_path: Path, umask: int) -> None:
    """safetensors makes files that their owner alone may read: https://github.com/safetensors/safetensors/issues/782."""
    source, before = HFFolder(sound), os.umask(umask)
    try:
        write_hf_folder(tmp_path / "out", stored(source), source, shard_bytes=30_000, manifest_version=1)
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert len(modes) > 5 and set(modes.values()) == {0o666 & ~umask}


def test_plain_weights_are_written_without_the_record_of_a_quantization(sound: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sound, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": FP8}))
    (copy / "hf_quant_config.json").write_text("{}")
    source = HFFolder(copy)
    write_hf_folder(tmp_path / "out", stored(source), source)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert load_file(tmp_path / "out" / SINGLE).keys() == source.tensors.keys()


def write_and_be_killed(folder: Path, source: HFFolder) -> None:
    """Write half of a folder in a process of its own, and kill this process."""

    def dying() -> Iterator[tuple[str, torch.Tensor]]:
        for number, tensor in enumerate(stored(source)):
            if number == 12:
                os.kill(os.getpid(), signal.SIGKILL)
            yield tensor

    child = os.fork()
    if child == 0:
        try:
            write_hf_folder(folder, dying(), source, shard_bytes=30_000)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_what_a_killed_writer_left_is_removed_by_the_next_and_a_living_writer_is_left_alone(
    sound: Path, tmp_path: Path
) -> None:
    source = HFFolder(sound)
    write_and_be_killed(tmp_path / "out", source)
    (abandoned,) = tmp_path.iterdir()
    seen = []

    def meanwhile() -> Iterator[tuple[str, torch.Tensor]]:
        for number, tensor in enumerate(stored(source)):
            if number == 3:
                write_hf_folder(tmp_path / "out", stored(source), source)  # a second writer of the same folder
                seen.extend(path.name for path in tmp_path.iterdir())
            yield tensor

    write_hf_folder(tmp_path / "out", meanwhile(), source)
    assert abandoned.name not in seen and len(seen) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_named_with_what_is_free(sound: Path, tmp_path: Path) -> None:
    source, limits = HFFolder(sound), resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"a shard of \d+ bytes cannot be written to .*bytes are free"):
            write_hf_folder(tmp_path / "out", stored(source), source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []
