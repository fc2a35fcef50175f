"""Every family's model has the logits of transformers in megatron-core, and comes out with the stored bytes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megatron_rl.config import ParallelConfig, make_config
from megatron_rl.convert.compare_logits import packed_logits
from megatron_rl.errors import ConfigError
from megatron_rl.policy import parallel
from megatron_rl.policy.device_port import pick_device
from megatron_rl.policy.routing_replay import weight_buffers
from megatron_rl.weights.export import export_weights
from megatron_rl.weights.families import FAMILIES, ModelShape, read_family
from megatron_rl.weights.hf_folder import SINGLE, HFFolder
from megatron_rl.weights.hf_model import HFModel, check_folder
from megatron_rl.weights.load_weights import load_weights
from tests.families import FAMILIES_AT_TOY_SIZE, MIXTURES, make_family
from tests.policies import build_planned_chunks

TOKENS = torch.randint(0, 259, (48,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def mesh() -> parallel.Mesh:
    return parallel.initialize(ParallelConfig(), pick_device("cpu"), seed=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_family(tmp_path_factory.mktemp(name), name) for name in FAMILIES_AT_TOY_SIZE}


def built(source: HFModel, mesh: parallel.Mesh, shape: ModelShape | None = None) -> Any:
    """Return megatron-core's model with the folder's weights. Every parameter is NaN before they are loaded."""
    config = make_config({"model": {"path": str(source.path)}})
    (chunk,) = build_planned_chunks(config, shape or source.shape, mesh)
    for tensor in (*chunk.parameters(), *(b for name, b in chunk.named_buffers() if name.endswith("expert_bias"))):
        nn.init.constant_(tensor, float("nan"))
    load_weights([chunk], source, tp_rank=0, tp_size=1)
    return chunk


def expected_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(TOKENS[None]).logits[0]


@pytest.mark.parametrize("name", FAMILIES_AT_TOY_SIZE)
def test_the_logits_are_those_of_transformers(name: str, folders: dict[str, Path], mesh: parallel.Mesh) -> None:
    source = check_folder(HFFolder(folders[name]))
    wanted = expected_logits(folders[name])
    assert 1 < wanted.abs().max() < 20
    assert (packed_logits(built(source, mesh), TOKENS) - wanted).abs().max() < 5e-6


@pytest.mark.parametrize("name", FAMILIES_AT_TOY_SIZE)
def test_loading_and_exporting_gives_the_stored_bytes(name: str, folders: dict[str, Path], mesh: parallel.Mesh) -> None:
    source = check_folder(HFFolder(folders[name]))
    exported = dict(export_weights([built(source, mesh)], source.family, source.shape, dtypes=source.dtypes))
    stored = load_file(folders[name] / SINGLE)
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[key], stored[key]) for key in stored)


def without_windows(shape: ModelShape) -> ModelShape:
    return replace(shape, windows=())


def with_plain_rope(shape: ModelShape) -> ModelShape:
    return replace(shape, rope=replace(shape.rope, scaling=type(shape.rope)(1.0, 2).scaling))


def with_plain_scores(shape: ModelShape) -> ModelShape:
    return replace(shape, rope=replace(shape.rope, scaling=replace(shape.rope.scaling, mscale_all_dim=0.0)))


def with_rope_in_halves(shape: ModelShape) -> ModelShape:
    return replace(shape, rope=replace(shape.rope, interleaved=False))


def with_plain_activation(shape: ModelShape) -> ModelShape:
    return replace(shape, activation="silu")


def with_experts(**changes: Any) -> Callable[[ModelShape], ModelShape]:
    return lambda shape: replace(shape, experts=replace(shape.experts, **changes))


def with_the_epsilon_of_other_norms(shape: ModelShape) -> ModelShape:
    return replace(shape, latent=replace(shape.latent, norm_eps=shape.norm_eps))


@pytest.mark.parametrize(
    ("name", "ignore"),
    [
        ("qwen2_windows", without_windows),
        ("mistral", without_windows),
        ("llama3", with_plain_rope),
        ("qwen3_yarn", with_plain_rope),
        ("qwen3_linear", with_plain_rope),
        ("glm4", with_rope_in_halves),
        ("glm4_moe", with_experts(scaling=1.0)),
        ("gpt_oss", without_windows),
        ("gpt_oss", with_plain_rope),
        ("gpt_oss", with_plain_activation),
        ("deepseek_v3", with_plain_rope),
        ("deepseek_v3", with_plain_scores),
        ("deepseek_v3", with_experts(groups=1)),
        ("moonlight", with_the_epsilon_of_other_norms),
    ],
)
def test_what_is_ignored_changes_the_logits(
    name: str, ignore: Callable[[ModelShape], ModelShape], folders: dict[str, Path], mesh: parallel.Mesh
) -> None:
    source = check_folder(HFFolder(folders[name]))
    wrong = packed_logits(built(source, mesh, ignore(source.shape)), TOKENS)
    assert (wrong - expected_logits(folders[name])).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3"])
def test_a_router_without_its_correction_bias_has_other_logits(
    name: str, folders: dict[str, Path], mesh: parallel.Mesh
) -> None:
    chunk = built(check_folder(HFFolder(folders[name])), mesh)
    for _, bias in weight_buffers(chunk):
        bias.zero_()
    assert (packed_logits(chunk, TOKENS) - expected_logits(folders[name])).abs().max() > 0.05


@pytest.mark.parametrize("part", ["softmax_offset", "router.bias", "linear_fc1.bias", "linear_fc2.bias"])
def test_every_small_part_of_gpt_oss_changes_the_logits(
    part: str, folders: dict[str, Path], mesh: parallel.Mesh
) -> None:
    chunk = built(check_folder(HFFolder(folders["gpt_oss"])), mesh)
    for name, parameter in chunk.named_parameters():
        if name.endswith(part):
            nn.init.constant_(parameter, -100.0 if part == "softmax_offset" else 0.0)
    assert (packed_logits(chunk, TOKENS) - expected_logits(folders["gpt_oss"])).abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name in MIXTURES if name != "gpt_oss"])
def test_experts_that_are_stacked_in_the_folder_load_alike(
    name: str, folders: dict[str, Path], mesh: parallel.Mesh, tmp_path: Path
) -> None:
    source = check_folder(HFFolder(make_family(tmp_path, name, original_format=False)))
    assert any(stored.endswith("experts.gate_up_proj") for stored in source.folder.tensors)
    exported = dict(export_weights([built(source, mesh)], source.family, source.shape, dtypes=source.dtypes))
    stored = load_file(folders[name] / SINGLE)
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[key], stored[key]) for key in stored)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_defaults_of_absent_keys_are_those_of_transformers(family: Any) -> None:
    theirs = CONFIG_MAPPING[family.model_type]()
    for key, value in family.defaults.items():
        held = getattr(theirs, key)
        if key == "sliding_window" and held is None:  # transformers clears it where `use_sliding_window` is false
            held = type(theirs).sliding_window
        assert (held or []) == (value or []), key
    stated = theirs.to_dict() | {"architectures": list(family.architectures)}
    stated = {key: value for key, value in stated.items() if key not in ("rope_parameters", "rope_scaling")}
    if family.model_type == "gpt_oss":
        with pytest.raises(ConfigError, match="gpt-oss is trained with YaRN"):
            read_family(stated, "config.json")
        return
    shape = read_family({"head_dim": 128} | stated, "config.json")[1]  # GLM-4.5's class has none that fits its heads
    assert shape.rope.theta == theirs.rope_parameters["rope_theta"]
