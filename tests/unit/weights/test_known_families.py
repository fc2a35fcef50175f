"""What a family cannot hold is refused in words: architectures with the reason, gpt-oss' and GLM-4's other forms."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from megatron_rl.errors import CheckpointError, ConfigError
from megatron_rl.server.model_weights import read_weights
from megatron_rl.weights.families import FAMILIES, family_of, read_family
from megatron_rl.weights.families.unsupported import UNSUPPORTED
from megatron_rl.weights.hf_folder import SINGLE, HFFolder
from megatron_rl.weights.hf_model import check_folder
from megatron_rl.weights.layouts import FusedGateUp, HeadRows, InterleavedGateUp, Transposed
from tests.families import make_family


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("Qwen3NextForCausalLM", "gated delta net"),
        ("NemotronHForCausalLM", "Mamba"),
        ("DeepseekV32ForCausalLM", "DSA"),
        ("Gemma3ForCausalLM", "planned"),
        ("Qwen2_5_VLForConditionalGeneration", "no vision tower"),
        ("SomethingNewForCausalLM", "; supported: "),
    ],
)
def test_an_architecture_that_is_not_supported_is_refused_with_the_reason(architecture: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"'{architecture}' is not supported.*{why}.*GptOssForCausalLM"):
        family_of({"architectures": [architecture]}, "config.json")


def test_no_supported_architecture_is_called_unsupported() -> None:
    assert not UNSUPPORTED.keys() & {name for family in FAMILIES for name in family.architectures}


@pytest.fixture(scope="module")
def oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("oss"), "gpt_oss")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"swiglu_limit": 8.0}, "'swiglu_limit' is 8.0"),
        ({"swiglu_alpha": 1.0}, "'swiglu_alpha' is 1.0"),
        ({"attention_bias": False}, "'attention_bias' is False"),
        ({"experts_per_token": 3}, "contradict each other"),
        ({"rope_parameters": None}, "its constants are needed"),
        ({"sliding_window": 0}, "'sliding_window' is 0"),
    ],
)
def test_another_kind_of_gpt_oss_is_refused(oss: Path, changes: dict[str, Any], words: str) -> None:
    config = json.loads((oss / "config.json").read_text())
    read_family(config, "config.json")
    with pytest.raises(ConfigError, match=rf"config\.json: .*{words}"):
        read_family(config | changes, "config.json")


def test_mxfp4_codes_are_refused_by_name(oss: Path, tmp_path: Path) -> None:
    tensors = load_file(oss / SINGLE)
    name = "model.layers.0.mlp.experts.down_proj"
    del tensors[name]
    tensors |= {f"{name}_{part}": torch.zeros(4, 64, 3, dtype=torch.uint8) for part in ("blocks", "scales")}
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    config = json.loads((oss / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantized with 'mxfp4', which is not read: give the float32"):
        check_folder(HFFolder(tmp_path))


def test_a_stacked_tensor_of_too_few_experts_is_refused(oss: Path, tmp_path: Path) -> None:
    tensors = load_file(oss / SINGLE)
    name = "model.layers.1.mlp.experts.down_proj_bias"
    save_file(tensors | {name: tensors[name][:3].clone()}, tmp_path / SINGLE, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((oss / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"down_proj_bias.* has shape \[3, 64\].* asks for \[4, 64\]"):
        check_folder(HFFolder(tmp_path))


def test_the_embedded_engine_serves_gpt_oss(oss: Path) -> None:
    read_weights(oss, AutoConfig.from_pretrained(oss), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        (HeadRows(4, 3, (5,)), 2),
        (HeadRows(4, 1, ()), 4),
        (FusedGateUp(6, 5), 3),
        (InterleavedGateUp(6, (5,)), 1),
        (InterleavedGateUp(6, ()), 1),
        (Transposed((3, 5)), 1),
    ],
    ids=str,
)
def test_a_layout_gives_back_what_it_read(layout: Any, size: int) -> None:
    (shape,) = layout.shapes
    stored = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    sources = [lambda start, stop, dim=0: stored.narrow(dim, start, stop - start)]
    shards = [layout.read(sources, rank, size) for rank in range(size)]
    assert all(tuple(shard.shape) == layout.local_shape(size) for shard in shards)
    (back,) = layout.merge(shards)
    assert torch.equal(back, stored)


def test_gate_and_up_columns_of_gpt_oss_alternate() -> None:
    stored = torch.tensor([0.0, 10.0, 1.0, 11.0, 2.0, 12.0])
    read = InterleavedGateUp(3, ()).read([lambda start, stop, dim=0: stored[start:stop]], 0, 1)
    assert read.tolist() == [0.0, 1.0, 2.0, 10.0, 11.0, 12.0]
