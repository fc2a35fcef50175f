"""Model folders that people have, and what must become of each: it is used, or refused with these words."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


@dataclass(frozen=True)
class FolderCase:
    """One folder: how it differs from a sound one.

    Attributes:
        name: name of the test.
        change: changes a copy of a tiny Qwen3 folder (untied, float32, one file).
        refusal: a pattern of the error; None if the folder must be accepted.
        source: public report of such a folder.
    """

    name: str
    change: Callable[[Path], Any]
    refusal: str | None = None
    source: str = ""


def _config(**values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))

    return change


def _tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        edit(tensors)
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / SINGLE)

    return change


def _tied(head: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        _config(tie_word_embeddings=True)(folder)
        _tensors(lambda t: t.update({"lm_head.weight": head(t["model.embed_tokens.weight"])}))(folder)

    return change


def _bfloat16_embedding_with_float32_head(folder: Path) -> None:
    _config(tie_word_embeddings=True)(folder)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].float()

    _tensors(edit)(folder)


def _index(file: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        names = load_file(folder / SINGLE)
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))

    return change


def _outside(file: Callable[[Path], str]) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        outside = folder.parent / "outside.safetensors"
        _index(file(outside))(folder)
        (folder / SINGLE).rename(outside)

    return change


def _header(edit: Callable[[str], str]) -> Callable[[Path], Any]:
    """Change the text of the safetensors header; the data stays as it is."""

    def change(folder: Path) -> None:
        raw = (folder / SINGLE).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        text = edit(raw[8 : 8 + length].decode()).encode()
        (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return change


def _move_tensors(by: Callable[[int], int]) -> Callable[[str], str]:
    """Move each tensor after the first by some bytes, by its number in the file."""

    def edit(text: str) -> str:
        header = json.loads(text)
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        for number, entry in enumerate(sorted(entries, key=lambda entry: int(entry["data_offsets"][0]))):
            entry["data_offsets"] = [place + by(number) for place in entry["data_offsets"]]
        return json.dumps(header)

    return edit


def _name_twice(text: str) -> str:
    name, entry = next((name, entry) for name, entry in json.loads(text).items() if name != "__metadata__")
    return f'{text.rstrip()[:-1]}, "{name}": {json.dumps(entry)}}}'


def _without(*files: str, **written: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()
        for file, text in written.items():
            (folder / file.replace("__", ".")).write_text(text)

    return change


def _stored(value: float) -> Callable[[Path], Any]:
    return _tensors(lambda tensors: tensors[UP].__setitem__((3, 3), value))


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"

CASES = (
    FolderCase("sound", lambda folder: None),
    FolderCase(
        "plain weights that config.json calls quantized",
        _config(quantization_config=FP8),
        r"has a 'quantization_config' \('fp8'\), but every tensor is plain",
        "https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/5823",
    ),
    FolderCase("a quantization_config that is null", _config(quantization_config=None)),
    FolderCase(
        "a NaN in a weight",
        _stored(math.nan),
        "tensor .*up_proj.weight of .* NaN",
        "https://github.com/THUDM/slime/issues/2256",
    ),
    FolderCase("an infinity in a weight", _stored(-math.inf), "tensor .*up_proj.weight of .* infinite"),
    FolderCase("NaN in config.json", _config(rms_norm_eps=math.nan), "'rms_norm_eps' is not a finite number"),
    FolderCase("1e400 in config.json", _config(rope_theta=math.inf), "'rope_theta' is not a finite number"),
    FolderCase(
        "an infinity deep in config.json",
        _config(rope_parameters={"rope_type": "default", "rope_theta": math.inf}),
        "'rope_parameters.rope_theta' is not a finite number",
    ),
    FolderCase("config.json nested too deep", _without(config__json="[" * 100_000), "config.json is not valid JSON"),
    FolderCase("one file and an index to it", _index(SINGLE)),
    FolderCase("one file and an index to another", _index("model-00001-of-00001.safetensors"), "out of date"),
    FolderCase("an index with nothing", _without(model__safetensors__index__json='{"weight_map": {}}'), "weight_map"),
    FolderCase(
        "an index that leaves the folder",
        _outside(lambda file: f"../{file.name}"),
        "bare file names",
        "https://github.com/unslothai/unsloth/pull/6796",
    ),
    FolderCase("an index with an absolute path", _outside(str), "bare file names"),
    FolderCase(
        "float64 weights", _tensors(lambda t: t.update({UP: t[UP].double()})), "is float64.*convert it to float32"
    ),
    FolderCase("whole numbers as weights", _tensors(lambda t: t.update({UP: t[UP].int()})), "is int32.*quantized"),
    FolderCase(
        "a pickled model",
        lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"),
        "pytorch_model.bin.*pickle.*save_pretrained",
    ),
    FolderCase(
        "shards without an index",
        lambda f: (f / SINGLE).rename(f / "model-00001-of-00002.safetensors"),
        "has model-00001-of-00002.safetensors, but no index",
    ),
    FolderCase("no weights at all", lambda f: (f / SINGLE).unlink(), "the weights were not copied"),
    FolderCase("a Git-LFS pointer", lambda f: (f / SINGLE).write_text(LFS), "Git-LFS pointer.*git lfs pull"),
    FolderCase("an adapter", _without("config.json", adapter_config__json="{}"), "adapter.*merge"),
    FolderCase("an adapter beside a whole model", _without(adapter_config__json="{}")),
    FolderCase("a tied head, stored too", _tied(torch.clone)),
    FolderCase("a tied head, stored in another dtype with equal values", _bfloat16_embedding_with_float32_head),
    FolderCase("a tied head that was rounded", _tied(torch.Tensor.bfloat16), "'lm_head.weight' .* differs"),
    FolderCase("two architectures", _config(architectures=["Qwen3ForCausalLM", "X"]), "exactly one name is needed"),
    FolderCase("holes between tensors", _header(_move_tensors(lambda number: 8 * min(number, 1))), "begin at"),
    FolderCase("tensors that overlap", _header(_move_tensors(lambda number: -8 * min(number, 1))), "begin at"),
    FolderCase("a name twice in the header", _header(_name_twice), "stands twice"),
    FolderCase("layer_types too short", _config(layer_types=["full_attention"]), "one word for each of 2 layers"),
    FolderCase("layer_types that is a word", _config(layer_types="full_attention"), "one word for each of 2 layers"),
)

# Folders that `megatron-rl serve` is given; the trainer need not have seen them.
DEEP, CUT = "[" * 100_000, '{"a": '
SERVED = (
    FolderCase("sound", lambda folder: None),
    FolderCase("config.json that is cut", _without(config__json=CUT), "config.json cannot be read"),
    FolderCase("config.json nested too deep", _without(config__json=DEEP), "config.json cannot be read"),
    FolderCase("config.json that is a list", _without(config__json="[]"), "config.json cannot be read"),
    FolderCase("a model type that nobody knows", _config(model_type="mine"), "config.json cannot be read .*mine"),
    FolderCase("a size that is text", _config(hidden_size="64"), "config.json cannot be read .*hidden_size"),
    FolderCase("a quantization_config that is a number", _config(quantization_config=7), "config.json"),
    FolderCase("generation settings that are cut", _without(generation_config__json=CUT), "generation_config.json can"),
    FolderCase("generation settings that are a list", _without(generation_config__json="[1]"), "generation_config.jso"),
    FolderCase(
        "an end of text that is text",
        _without(generation_config__json='{"eos_token_id": "</s>"}'),
        "eos_token_id .*names '</s>'; give the id",
    ),
    FolderCase(
        "an end of text below 0",
        _without(generation_config__json='{"eos_token_id": [1, -1]}'),
        "eos_token_id .*names '-1'; give the id",
    ),
    FolderCase("a tokenizer that is cut", _without(tokenizer__json=CUT), "tokenizer.json cannot be read"),
    FolderCase("a manifest nested too deep", _without(manifest__json=DEEP), "manifest.json is not a manifest"),
    FolderCase("a manifest that is a number", _without(manifest__json="7"), "manifest.json is not a manifest"),
    FolderCase("a Git-LFS pointer", lambda f: (f / SINGLE).write_text(LFS), "not a whole safetensors file"),
    FolderCase("no weights at all", lambda f: (f / SINGLE).unlink(), "no .*safetensors file"),
)
