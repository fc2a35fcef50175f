"""A Hugging Face folder is checked when it is read, and a written folder is either complete or absent."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_rl.errors import CheckpointError
from megatron_rl.weights.digest import tensor_digest
from megatron_rl.weights.hf_folder import INDEX, SINGLE, HFFolder
from megatron_rl.weights.write_folder import write_hf_folder

SHARD = 100_000


def stored(folder: HFFolder) -> Iterator[tuple[str, torch.Tensor]]:
    for name in folder.tensors:
        yield name, folder.read(name)


@pytest.fixture
def copy(qwen3: Path, tmp_path: Path) -> Path:
    """A private copy of the untied checkpoint, in one file."""
    return Path(shutil.copytree(qwen3, tmp_path / "single"))


@pytest.fixture
def sharded(qwen3: Path, tmp_path: Path) -> Path:
    source = HFFolder(qwen3)
    write_hf_folder(tmp_path / "sharded", stored(source), source, shard_bytes=SHARD)
    return tmp_path / "sharded"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def truncate(file: Path, size: int) -> None:
    with file.open("r+b") as stream:
        stream.truncate(size)


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_headers_give_the_names_shapes_and_dtypes_of_the_stored_tensors(qwen3: Path) -> None:
    folder, expected = HFFolder(qwen3), load_file(qwen3 / SINGLE)
    assert {name: (info.shape, info.dtype) for name, info in folder.tensors.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in expected.items()
    }
    assert folder.nbytes == sum(tensor.nbytes for tensor in expected.values())


def test_reading_rows_and_columns_gives_that_slice(qwen3: Path) -> None:
    folder, name = HFFolder(qwen3), "model.layers.1.mlp.down_proj.weight"
    whole = load_file(qwen3 / SINGLE)[name]
    assert torch.equal(folder.read(name), whole)
    assert torch.equal(folder.read_rows(name, 3, 9), whole[3:9])
    assert torch.equal(folder.read_rows(name, 5, 70, 1), whole[:, 5:70])
    assert folder.read_rows(name, 64, 64).shape == (0, 96)


def test_a_slice_of_a_huge_tensor_reads_only_that_slice(copy: Path) -> None:
    rows, columns = 2**20, 2**12
    text = json.dumps(
        {"huge": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, 4 * rows * columns]}}
    ).encode()
    with (copy / SINGLE).open("wb") as stream:  # a sparse file: 16 GiB that occupy no disk
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + 4 * rows * columns)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    part = HFFolder(copy).read_rows("huge", rows - 100, rows).contiguous()
    assert part.shape == (100, columns) and part.sum() == 0
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 50 * part.nbytes


def test_a_folder_written_in_shards_has_the_bytes_names_and_index_of_the_source(sharded: Path, qwen3: Path) -> None:
    files, source = shards(sharded), load_file(qwen3 / SINGLE)
    assert len(files) > 3
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in source.values())
    assert set(index["weight_map"]) == set(source)
    for name, tensor in stored(HFFolder(sharded)):
        assert torch.equal(tensor.view(-1).view(torch.uint8), source[name].view(-1).view(torch.uint8)), name
    for file in files:
        assert len(load_file(file)) == 1 or sum(tensor.nbytes for tensor in load_file(file).values()) <= SHARD


def test_transformers_loads_a_written_folder_and_computes_the_same_logits(sharded: Path, qwen3: Path) -> None:
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        ours, theirs = (AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (sharded, qwen3))
    assert torch.equal(ours, theirs)


def test_one_shard_is_a_single_file_without_an_index(qwen3: Path, tmp_path: Path) -> None:
    source = HFFolder(qwen3)
    digests = write_hf_folder(tmp_path / "out", stored(source), source, manifest_version=7)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "manifest.json",
        SINGLE,
    ]
    assert digests == {name: tensor_digest(tensor) for name, tensor in load_file(qwen3 / SINGLE).items()}
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == {"version": 7, "tensors": digests}


def test_tokenizer_files_templates_and_licences_are_carried_over_and_old_weights_are_not(
    copy: Path, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "merges.txt", "chat_template.jinja", "LICENSE", "tokenizer.model"):
        (copy / name).write_text(name)
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tool.jinja").write_text("tool")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "manifest.json", "notes.md"):
        (copy / name).write_text(name)
    source = HFFolder(copy)
    write_hf_folder(tmp_path / "out", stored(source), source)
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {
        SINGLE,
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "LICENSE",
        "additional_chat_templates/tool.jinja",
    }


@pytest.mark.parametrize("keys", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()])
def test_config_json_names_the_dtype_that_was_written(copy: Path, tmp_path: Path, keys: tuple[str, ...]) -> None:
    config = json.loads((copy / "config.json").read_text())
    config.pop("dtype")
    (copy / "config.json").write_text(json.dumps(config | dict.fromkeys(keys, "float32")))
    source = HFFolder(copy)
    write_hf_folder(tmp_path / "out", ((name, tensor.bfloat16()) for name, tensor in stored(source)), source)
    out = HFFolder(tmp_path / "out")
    assert {info.dtype for info in out.tensors.values()} == {torch.bfloat16}
    assert {key: out.config[key] for key in out.config if "dtype" in key} == dict.fromkeys(
        keys or ("dtype",), "bfloat16"
    )


def test_a_failed_write_leaves_no_trace(qwen3: Path, tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(2)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        write_hf_folder(tmp_path / "out", failing(), HFFolder(qwen3), shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_the_destination_holds_the_old_model_until_the_new_one_is_complete(copy: Path) -> None:
    source, before = HFFolder(copy), (copy / SINGLE).read_bytes()

    def doubled() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in stored(source):
            assert (copy / SINGLE).read_bytes() == before
            yield name, tensor * 2

    write_hf_folder(copy, doubled(), source)
    name = "model.norm.weight"
    assert torch.equal(HFFolder(copy).read(name), source.read(name) * 2)
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_a_destination_that_is_not_a_model_folder_is_never_replaced(qwen3: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years of work")
    source = HFFolder(qwen3)
    with pytest.raises(CheckpointError, match="not a model folder"):
        write_hf_folder(tmp_path, stored(source), source)
    assert (tmp_path / "thesis.tex").read_text() == "ten years of work"


def test_a_tensor_given_twice_and_an_empty_export_are_refused(qwen3: Path, tmp_path: Path) -> None:
    source = HFFolder(qwen3)
    with pytest.raises(CheckpointError, match="'a' is written twice"):
        write_hf_folder(tmp_path / "out", [("a", torch.ones(1)), ("a", torch.ones(1))], source)
    with pytest.raises(CheckpointError, match="no tensors"):
        write_hf_folder(tmp_path / "out", [], source)


def test_a_missing_folder_or_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model folder at .*/nowhere"):
        HFFolder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        HFFolder(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_config_that_is_not_a_json_object_is_named(copy: Path, text: str) -> None:
    (copy / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        HFFolder(copy)


def test_a_folder_without_safetensors_is_named(copy: Path) -> None:
    (copy / SINGLE).rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="save_pretrained"):
        HFFolder(copy)


def test_a_single_file_beside_an_index_is_ambiguous(sharded: Path, qwen3: Path) -> None:
    shutil.copy(qwen3 / SINGLE, sharded)
    with pytest.raises(CheckpointError, match="out of date"):
        HFFolder(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    lost = shards(sharded)[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=rf"{lost.name} is listed .* but missing"):
        HFFolder(sharded)


def test_a_tensor_of_the_index_that_its_shard_lacks_is_named(sharded: Path) -> None:
    file = shards(sharded)[0].name
    edit_index(sharded, lambda names: names.update({"model.ghost.weight": file}))
    with pytest.raises(CheckpointError, match=r"'model\.ghost\.weight' is listed .* absent from .*" + file):
        HFFolder(sharded)


def test_a_tensor_of_a_shard_that_the_index_lacks_is_named(sharded: Path) -> None:
    edit_index(sharded, lambda names: names.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is in .* does not place it there"):
        HFFolder(sharded)


def test_an_index_without_a_weight_map_is_named(sharded: Path) -> None:
    (sharded / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        HFFolder(sharded)


@pytest.mark.parametrize(
    ("size", "words"), [(0, "header"), (5, "header"), (40, "truncated inside its header"), (-1, "truncated")]
)
def test_a_truncated_file_is_named_wherever_it_ends(copy: Path, size: int, words: str) -> None:
    truncate(copy / SINGLE, size if size >= 0 else (copy / SINGLE).stat().st_size - 1)
    with pytest.raises(CheckpointError, match=rf"{SINGLE} .*{words}"):
        HFFolder(copy)


def test_bytes_after_the_last_tensor_are_refused(copy: Path) -> None:
    with (copy / SINGLE).open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(CheckpointError, match="longer than its header says"):
        HFFolder(copy)


def header(entry: object) -> bytes:
    text = json.dumps({"a": entry}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "raw",
    [
        b"\x05\x00\x00\x00\x00\x00\x00\x00{bad}",
        b"\x02\x00\x00\x00\x00\x00\x00\x00[]",
        (1 << 60).to_bytes(8, "little") + b"{}",
        header({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}) + b"....",
        header({"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}) + b"....",
        header({"dtype": "F32", "data_offsets": [0, 4]}) + b"....",
        header([1, 2]) + b"....",
    ],
    ids=[
        "not JSON",
        "not an object",
        "absurd length",
        "offsets against shape",
        "unknown dtype",
        "no shape",
        "entry not an object",
    ],
)
def test_a_corrupt_header_is_named(copy: Path, raw: bytes) -> None:
    (copy / SINGLE).write_bytes(raw)
    with pytest.raises(CheckpointError, match=rf"{SINGLE} .*header"):
        HFFolder(copy)


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0"])
def test_a_dtype_of_the_format_that_is_not_read_is_no_damage(dtype: str, copy: Path) -> None:
    (copy / SINGLE).write_bytes(header({"dtype": dtype, "shape": [2], "data_offsets": [0, 2]}) + b"..")
    with pytest.raises(CheckpointError, match=f"tensor 'a' in .* is {dtype}, which is not read: give the float32"):
        HFFolder(copy)


def test_reading_a_tensor_the_folder_lacks_names_it(qwen3: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.ghost'"):
        HFFolder(qwen3).read("model.ghost")


def test_a_digest_tells_dtype_shape_and_every_bit(tmp_path: Path) -> None:
    zero, negative = torch.zeros(2, 2), torch.zeros(2, 2).neg()
    digests = [tensor_digest(t) for t in (zero, negative, zero.reshape(4), zero.to(torch.int32))]
    assert len(set(digests)) == 4
    save_file({"t": zero}, tmp_path / "t.safetensors")
    assert tensor_digest(load_file(tmp_path / "t.safetensors")["t"]) == digests[0]
