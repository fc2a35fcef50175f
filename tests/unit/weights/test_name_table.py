"""A folder's headers are checked against its family's name table before any model is built."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rl.errors import CheckpointError, ConfigError
from megatron_rl.weights.families import ModelShape, family_of, read_family
from megatron_rl.weights.families.rope import RopePlan
from megatron_rl.weights.hf_folder import SINGLE, HFFolder
from megatron_rl.weights.hf_model import check_folder
from megatron_rl.weights.name_table import entries
from tests.models import make_qwen3

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "dtype": "bfloat16",
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "vocab_size": 259,
}


def shape_of(config: dict[str, Any]) -> ModelShape:
    return read_family(config, "config.json")[1]


@pytest.fixture
def copy(qwen3: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(qwen3, tmp_path / "untied"))


@pytest.fixture
def tied_copy(qwen3_tied: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(qwen3_tied, tmp_path / "tied"))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / SINGLE)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_the_shape_is_read_from_the_config_of_transformers_4_and_of_5() -> None:
    expected = ModelShape(
        num_layers=4,
        hidden_size=64,
        num_heads=8,
        num_kv_heads=4,
        head_dim=16,
        ffn_hidden_size=96,
        vocab_size=259,
        norm_eps=1e-6,
        rope=RopePlan(1e6, 16),
        qk_norm=True,
        tied_embeddings=True,
        max_position_embeddings=512,
    )
    four = {
        **CONFIG,
        "torch_dtype": "bfloat16",
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    four.pop("dtype")
    five = {
        **CONFIG,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "layer_types": ["full_attention"] * 4,
    }
    five.pop("rope_theta")
    assert shape_of(four) == shape_of(five) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "axial"}}, "'axial' RoPE"),
        ({"layer_types": ["full_attention"] * 3 + ["linear_attention"]}, "'linear_attention'"),
        ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "no 'sliding_window' is in use"),
        ({"use_sliding_window": "yes"}, "'use_sliding_window' is 'yes'"),
        ({"attention_bias": True}, "'attention_bias' is True"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'.*supported: 'silu'"),
        ({"num_key_value_heads": 3}, "'num_key_value_heads' = 3 does not divide 'num_attention_heads' = 8"),
        ({"attention_multiplier": 2.0}, "'attention_multiplier' is 2.0, which this family does not know"),
        ({"mlp_bias": True}, "'mlp_bias' is True, which this family does not know"),
        ({"hidden_size": "64"}, "'hidden_size' is '64'"),
        ({"rope_theta": True}, "'rope_theta' is True"),
        ({"tie_word_embeddings": 1}, "'tie_word_embeddings' is 1"),
    ],
)
def test_a_model_that_is_not_supported_is_refused_naming_the_key(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: .*{words}"):
        shape_of({**CONFIG, **changes})


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"]
)
def test_a_missing_key_without_a_default_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"key '{key}' is missing"):
        shape_of({name: value for name, value in CONFIG.items() if name != key})


@pytest.mark.parametrize(
    "architectures", [["GemmaForCausalLM"], None, [], ["Qwen3ForCausalLM", "Other"], "Qwen3ForCausalLM"]
)
def test_an_unknown_architecture_is_refused_listing_the_known(architectures: object) -> None:
    with pytest.raises(ConfigError, match="Qwen3ForCausalLM"):
        family_of({"architectures": architectures}, "config.json")


def test_the_table_names_every_tensor_transformers_writes_once(qwen3: Path, qwen3_tied: Path) -> None:
    for path in (qwen3, qwen3_tied):
        folder = HFFolder(path)
        model = check_folder(folder)
        exported = [
            name for entry in entries(model.family, model.shape) if entry.rule.exported for name in entry.rule.hf
        ]
        assert sorted(exported) == sorted(folder.tensors)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (3, r"does not divide intermediate_size.*works is|does not divide num_attention_heads.*works is"),
        (16, "does not divide num_attention_heads = 8"),
    ],
)
def test_a_tensor_parallel_size_the_model_cannot_have_is_refused(qwen3: Path, size: int, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"parallel\.tensor = {size} (?:{words})"):
        check_folder(HFFolder(qwen3), tensor_parallel=size)


def test_more_ranks_than_key_value_heads_share_them_and_never_unevenly(tmp_path: Path) -> None:
    folder = HFFolder(
        make_qwen3(tmp_path, tied=True, layers=1, num_attention_heads=12, num_key_value_heads=4, head_dim=24)
    )
    check_folder(folder, tensor_parallel=12)
    with pytest.raises(ConfigError, match=r"= 6 neither divides num_key_value_heads = 4"):
        check_folder(folder, tensor_parallel=6)


def test_a_missing_tensor_is_named(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.pop("model.layers.2.self_attn.k_proj.weight"))
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.2\.self_attn\.k_proj\.weight'"):
        check_folder(HFFolder(copy))


def test_an_unknown_tensor_is_named(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.update({"model.layers.2.self_attn.q_proj.bias": torch.zeros(128)}))
    with pytest.raises(CheckpointError, match=r"'model\.layers\.2\.self_attn\.q_proj\.bias' .* not in the table"):
        check_folder(HFFolder(copy))


def test_a_layer_too_many_is_an_unknown_tensor(copy: Path) -> None:
    edit_config(copy, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.3\..*with 3 layers"):
        check_folder(HFFolder(copy))


def test_a_tensor_of_another_shape_is_named_with_both_shapes(copy: Path) -> None:
    edit_config(copy, intermediate_size=112)
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight' .* has shape \[96, 64\].*asks for \[112, 64\]"):
        check_folder(HFFolder(copy))


def test_a_quantized_tensor_is_refused(copy: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(copy, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight' .* is float8_e4m3fn: .*quantized"):
        check_folder(HFFolder(copy))


def test_rotary_frequencies_stored_as_buffers_are_ignored(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    check_folder(HFFolder(copy), tensor_parallel=2)


def test_a_tied_model_may_store_its_output_layer_when_it_is_the_embedding(tied_copy: Path) -> None:
    edit_tensors(tied_copy, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    check_folder(HFFolder(tied_copy))


def test_a_tied_model_with_another_output_layer_is_refused(tied_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def differ_in_the_last_row(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][-1, -1] += 1

    edit_tensors(tied_copy, differ_in_the_last_row)
    monkeypatch.setattr("megatron_rl.weights.hf_model._COMPARE_BYTES", 1000)  # several blocks of rows
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' .* tie_word_embeddings"):
        check_folder(HFFolder(tied_copy))


def test_an_untied_model_needs_its_output_layer(tied_copy: Path) -> None:
    edit_config(tied_copy, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"no tensor 'lm_head\.weight'"):
        check_folder(HFFolder(tied_copy))
