"""A model goes to Megatron's format and back without a changed byte, and a conversion survives whatever stops it."""

import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megatron_rl.convert import parts
from megatron_rl.convert.convert import Options, to_hf, to_megatron
from megatron_rl.convert.inspect import inspect_checkpoint, optimizer_format
from megatron_rl.convert.verbs import app
from megatron_rl.convert.verify import verify_manifest, verify_pair
from megatron_rl.errors import CheckpointError, MegatronRLError, UserError
from megatron_rl.precision.formats import quantize
from megatron_rl.precision.plan import WIRE
from megatron_rl.weights.hf_folder import INDEX, MANIFEST, SINGLE
from tests.families import FAMILIES_AT_TOY_SIZE, make_family

SMALL = Options(shard_bytes=200_000)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_family(tmp_path_factory.mktemp(name), name) for name in FAMILIES_AT_TOY_SIZE}


@pytest.fixture
def model(models: dict[str, Path]) -> Path:
    return models["qwen3_moe_dense_layer"]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_tensors(a: Path, b: Path) -> bool:
    first, second = tensors_of(a), tensors_of(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", FAMILIES_AT_TOY_SIZE)
def test_a_model_comes_back_from_torch_dist_without_a_changed_byte(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    to_megatron(models[name], tmp_path / "megatron", SMALL)
    to_hf(tmp_path / "megatron", tmp_path / "back", models[name], SMALL)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert same_tensors(tmp_path / "back", models[name])
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (models[name] / "config.json").read_text()
    )
    for checkpoint in (tmp_path / "megatron", tmp_path / "back"):
        assert verify_manifest(checkpoint, None, 1).same
        assert verify_pair(checkpoint, models[name], None, 1).same


def test_several_processes_write_what_one_writes(model: Path, tmp_path: Path) -> None:
    to_hf(model, tmp_path / "one", None, SMALL)
    to_hf(model, tmp_path / "two", None, Options(jobs=2, shard_bytes=SMALL.shard_bytes))
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "two").iterdir()) and INDEX in files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def killed_after(count: int, convert: Callable[[], Any]) -> None:
    """Run a conversion in a process of its own that is killed when `count` files are finished."""
    child = os.fork()
    if child == 0:
        write, finished = parts._write, []

        def counted(*arguments: Any) -> Any:
            if len(finished) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            finished.append(arguments)
            return write(*arguments)

        parts._write = counted
        try:
            convert()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("to", ["hf", "torch_dist"])
def test_a_conversion_that_was_killed_at_any_file_goes_on_and_ends_alike(to: str, model: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"

    def convert(place: Path) -> None:
        if to == "hf":
            to_hf(model, place, None, SMALL)
        else:
            to_megatron(model, place, SMALL)

    convert(whole)
    count = len(list(whole.glob("*.safetensors")) or list(whole.glob("release/*.distcp")))
    assert count > 3
    kept: dict[str, int] = {}
    for number in range(count):
        killed_after(1 if number else 0, lambda: convert(out))
        assert not out.exists()
        times = {file.name: file.stat().st_mtime_ns for file in out.with_name("out.partial").glob("*[0-9].[sd]*")}
        assert len(times) == number and all(times[name] == kept[name] for name in kept)
        kept = times
    convert(out)
    assert not out.with_name("out.partial").exists()
    assert verify_pair(out, whole, model, 1).same
    assert json.loads((out / MANIFEST).read_text())["tensors"] == json.loads((whole / MANIFEST).read_text())["tensors"]


def test_an_unfinished_conversion_with_another_plan_is_refused_until_it_is_restarted(
    model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed_after(1, lambda: to_hf(model, out, None, SMALL))
    with pytest.raises(UserError, match="unfinished conversion with another plan"):
        to_hf(model, out, None, Options(shard_bytes=400_000))
    assert inspect_checkpoint(out.with_name("out.partial")).kind == "an unfinished conversion"
    to_hf(model, out, None, Options(shard_bytes=400_000, restart=True))
    assert same_tensors(out, model)


def test_a_shard_that_was_cut_after_it_was_finished_is_written_again(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_after(2, lambda: to_hf(model, out, None, SMALL))
    first = sorted(out.with_name("out.partial").glob("*.safetensors"))[0]
    with first.open("r+b") as file:
        file.truncate(1000)
    to_hf(model, out, None, SMALL)
    assert same_tensors(out, model)


def test_a_process_that_is_killed_leaves_what_is_finished(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write, last = parts._write, f"model-{8:05d}"

    def kill_before_the_last(part: parts.Part, *others: Any) -> Any:
        if part.file > last:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(part, *others)

    parts._write = kill_before_the_last  # in forked processes
    try:
        with pytest.raises(CheckpointError, match="was killed, perhaps for lack of memory"):
            to_hf(model, out, None, Options(jobs=2, shard_bytes=50_000))
    finally:
        parts._write = write
    assert list(out.with_name("out.partial").glob("*.safetensors")) and not out.exists()
    to_hf(model, out, None, Options(jobs=2, shard_bytes=50_000))
    assert same_tensors(out, model)


def test_a_dtype_is_cast_and_said_and_every_other_file_is_carried(model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(model, tmp_path / "source"))
    for name in ("LICENSE", "README.md", "figures/a.txt", "tokenizer.json", "USE_POLICY.md", "chat_template.jinja"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    (source / "pytorch_model.bin").write_text("old")
    to_hf(source, tmp_path / "out", None, Options(dtype=torch.bfloat16))
    stored, written = tensors_of(source), tensors_of(tmp_path / "out")
    assert all(torch.equal(written[name], stored[name].bfloat16()) for name in stored)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["casts"] == sorted(stored)
    assert manifest["dropped"] == ["model.safetensors", "pytorch_model.bin"]
    for name in ("LICENSE", "README.md", "figures/a.txt", "tokenizer.json", "USE_POLICY.md", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_text() == name


def quantized_folder(folder: Path, model: Path, tile: tuple[int, int] = (32, 16)) -> tuple[Path, dict[str, Any]]:
    """Write a copy whose projections are FP8 codes with a scale for each tile. Return it and the codes' values."""
    tensors = tensors_of(model)
    values = dict(tensors)
    for name in [name for name in tensors if "proj" in name]:
        rows, columns = tensors[name].shape
        scale = torch.rand(-(-rows // tile[0]), -(-columns // tile[1])) * 0.01 + 0.001
        spread = scale.repeat_interleave(tile[0], 0)[:rows].repeat_interleave(tile[1], 1)[:, :columns]
        codes = (tensors[name] / spread).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = codes, scale
        values[name] = codes.float() * spread
    shutil.copytree(model, folder)
    (folder / SINGLE).unlink()
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(tile)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, values


def test_block_fp8_weights_are_dequantized_by_slices(models: dict[str, Path], tmp_path: Path) -> None:
    source, values = quantized_folder(tmp_path / "fp8", models["llama3"])
    to_hf(source, tmp_path / "plain", None, Options(dtype=torch.float32))
    written = tensors_of(tmp_path / "plain")
    assert written.keys() == values.keys()
    assert all(
        torch.equal(written[name], values[name].bfloat16().float() if "proj" in name else values[name])
        for name in values
    )
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert inspect_checkpoint(source).quantization == "fp8"


@pytest.mark.parametrize("name", ["fp8_blockwise", "fp8_blockwise_pow2"])
def test_codes_are_the_engines_own_and_come_through_untouched(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    to_hf(models["llama3"], tmp_path / "fp8", None, Options(quantize=name))
    codes, plain = tensors_of(tmp_path / "fp8"), tensors_of(models["llama3"])
    key = "model.layers.1.mlp.down_proj.weight"
    wanted = quantize(plain[key], WIRE[name])
    assert torch.equal(codes[key].view(torch.uint8), wanted.codes.view(torch.uint8))
    assert torch.equal(codes[f"{key}_scale_inv"], wanted.scale_inv)
    assert torch.equal(codes["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    assert verify_manifest(tmp_path / "fp8", None, 2).same
    to_hf(tmp_path / "fp8", tmp_path / "again", None, Options(quantize=name))
    again = tensors_of(tmp_path / "again")
    assert again.keys() == codes.keys()
    assert all(torch.equal(again[one].view(torch.uint8), codes[one].view(torch.uint8)) for one in codes)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale_inv"), "up_proj.weight' .* is float8_e4m3fn"),
        (lambda t: t["model.layers.0.mlp.up_proj.weight_scale_inv"].__setitem__((0, 0), 0.0), "not above 0"),
        (lambda t: t.update({"model.norm.weight_scale_inv": torch.ones(1)}), "model.norm.weight'.*scales"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(7, 7)}),
            r"has shape \[7, 7\], but .* need",
        ),
    ],
)
def test_codes_and_scales_that_do_not_belong_together_are_refused(
    spoil: Callable[[dict[str, torch.Tensor]], Any], words: str, models: dict[str, Path], tmp_path: Path
) -> None:
    source, _ = quantized_folder(tmp_path / "fp8", models["llama3"])
    tensors = tensors_of(source)
    spoil(tensors)
    save_file(tensors, source / SINGLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        to_hf(source, tmp_path / "plain", None, SMALL)
    assert not (tmp_path / "plain").exists()


def test_a_changed_bit_and_a_missing_tensor_are_differences(model: Path, tmp_path: Path) -> None:
    to_hf(model, tmp_path / "out", None, SMALL)
    file = next((tmp_path / "out").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    verdict = verify_manifest(tmp_path / "out", None, 2)
    assert len(verdict.differences) == 1 and "the manifest states" in verdict.differences[0]
    assert len(verify_pair(tmp_path / "out", model, None, 2).differences) == 1
    run = CliRunner().invoke(app, ["verify", str(tmp_path / "out")])
    assert run.exit_code == 1 and "1 differ" in run.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["to-hf", "{model}", "{model}"], "is, contains or lies in"),
        (["to-hf", "{model}", "{model}/inner"], "is, contains or lies in"),
        (["to-hf", "{model}", "{full}"], "exists: choose another folder"),
        (["to-hf", "{megatron}", "{out}"], "give --like HF_FOLDER"),
        (["to-hf", "{megatron}", "{out}", "--like", "{llama}"], "has no tensor|asks for"),
        (["to-hf", "{full}", "{out}"], "holds no checkpoint"),
        (["to-hf", "{model}", "{out}", "--dtype", "int4"], "--dtype is 'int4'"),
        (["to-hf", "{model}", "{out}", "--quantize", "nf4"], "--quantize is 'nf4'"),
        (["to-megatron", "{model}", "{out}", "--jobs", "-1"], "--jobs is -1: it must be positive"),
        (["to-megatron", "{model}", "{out}", "--shard-size", "0"], "--shard-size is 0.0: it must be positive"),
        (["verify", "{model}", "--jobs", "-1"], "--jobs is -1: it must be positive"),
        (["verify", "{model}"], "has no manifest.json"),
    ],
)
def test_what_cannot_be_converted_is_refused_before_a_byte_is_written(
    arguments: list[str], words: str, model: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    to_megatron(model, tmp_path / "megatron", SMALL)
    places = {
        "model": model,
        "full": tmp_path / "full",
        "out": tmp_path / "out",
        "megatron": tmp_path / "megatron",
        "llama": models["llama3"],
    }
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    run = CliRunner().invoke(app, [argument.format(**places) for argument in arguments])
    assert isinstance(run.exception, MegatronRLError)
    with pytest.raises(MegatronRLError, match=words):
        raise run.exception
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_dry_run_writes_nothing_and_a_full_disk_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    to_hf(model, tmp_path / "out", None, Options(dry_run=True))
    assert "files" in capsys.readouterr().out and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(parts.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(CheckpointError, match=r"needs \d+ bytes, and 10 are free"):
        to_hf(model, tmp_path / "out", None, SMALL)
    monkeypatch.undo()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written .*bytes are free"):
            to_hf(model, tmp_path / "out", None, SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    to_hf(model, tmp_path / "out", None, SMALL)
    assert same_tensors(tmp_path / "out", model)


@pytest.mark.parametrize("text", ["9" * 5000, "\N{SUPERSCRIPT TWO}", "-1", "7.0", "", "\0", "../release"])
def test_a_tracker_that_names_no_iteration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(CheckpointError, match="a number or 'release' is needed"):
        inspect_checkpoint(tmp_path)


def test_an_inspection_names_what_it_finds_and_what_is_refused(model: Path, tmp_path: Path) -> None:
    report = inspect_checkpoint(model, "*.layers.1.mlp.gate.weight")
    assert report.architecture == "Qwen3MoeForCausalLM" and not report.refused and len(report.tensors) == 1
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(CheckpointError, match="names iter_0000007, which does not exist"):
        inspect_checkpoint(tmp_path / "root")
    (tmp_path / "root" / "iter_0000007" / "mp_rank_00").mkdir(parents=True)
    assert "legacy" in inspect_checkpoint(tmp_path / "root").kind
    for kind, file in (("adapter", "adapter_config.json"), ("pickled", "pytorch_model.bin")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / file).write_text("{}")
        assert kind in inspect_checkpoint(tmp_path / kind).kind.replace("an adapter", "adapter")
    copy = Path(shutil.copytree(model, tmp_path / "gemma"))
    config = json.loads((copy / "config.json").read_text()) | {"architectures": ["Gemma2ForCausalLM"]}
    (copy / "config.json").write_text(json.dumps(config))
    run = CliRunner().invoke(app, ["inspect", str(copy), "--json"])
    assert run.exit_code == 2 and "'Gemma2ForCausalLM' is not supported" in json.loads(run.output)["refused"]


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("decoder.final_layernorm.weight", ""),
        ("optimizer.state.exp_avg.decoder.final_layernorm.weight", "by parameter"),
        ("chained_0.optimizer.state.fp32_param.decoder.final_layernorm.weight", "by parameter"),
        (
            "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16).bucket_idx_0.exp_avg",
            "dp_reshardable",
        ),
        ("chained_1.optimizer.distributed.dp_group_idx_3.param_state", "dp_zero_gather_scatter"),
        ("optimizer.buffers.0", "in an unknown format"),
    ],
)
def test_the_format_of_an_optimizer_state_shows_in_its_keys(key: str, found: str) -> None:
    assert optimizer_format(["embedding.word_embeddings.weight", key]) == found


def test_srun_processes_share_the_files_and_the_first_finishes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SLURM_STEP_ID", "0"), ("SLURM_NTASKS", "2"), ("SLURM_PROCID", "1")):
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    to_hf(model, out, None, SMALL)
    assert not out.exists() and list(out.with_name("out.partial").glob("*.safetensors"))
    monkeypatch.setenv("SLURM_PROCID", "0")
    to_hf(model, out, None, SMALL)
    assert same_tensors(out, model)
