"""Models with a sigmoid router: its bias keeps its bits, layers for multi-token prediction are carried, limits hold."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from megatron_rl.config import ParallelConfig, make_config
from megatron_rl.errors import CheckpointError, ConfigError, PrecisionError
from megatron_rl.policy import parallel
from megatron_rl.policy.device_port import pick_device
from megatron_rl.policy.routing_replay import weight_buffers
from megatron_rl.policy.shape_rules import check_shape
from megatron_rl.server.model_weights import read_weights
from megatron_rl.weights.families import read_family
from megatron_rl.weights.hf_folder import SINGLE, HFFolder
from megatron_rl.weights.hf_model import check_folder
from megatron_rl.weights.quantized import export_dtypes
from tests.families import make_family
from tests.policies import build_planned_policy, embedded_plan

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
BF16 = {"precision": {"train": "bf16", "rollout": "bf16"}}


def rewritten(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose biases are far from 0, where bfloat16 has steps that exceed their differences."""
    folder = make_family(tmp_path_factory.mktemp("glm"), "glm4_moe")
    tensors = load_file(folder / SINGLE)
    return rewritten(folder, {**tensors, BIAS: 7.0 + 0.1 * tensors[BIAS]})


@pytest.fixture(scope="module")
def with_mtp(glm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a layer for multi-token prediction."""
    folder = tmp_path_factory.mktemp("mtp")
    (folder / "config.json").write_text((glm / "config.json").read_text())
    tensors = load_file(glm / SINGLE)
    later = {k.replace("layers.1.", "layers.2."): v.clone() for k, v in tensors.items() if "layers.1." in k}
    later |= {"model.layers.2.enorm.weight": torch.randn(64), "model.layers.2.shared_head.head.weight": torch.ones(9)}
    return rewritten(folder, tensors | later)


def config_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text()) | changes


def test_a_policy_in_bfloat16_keeps_the_bits_of_the_bias(glm: Path) -> None:
    config = make_config({"model": {"path": str(glm)}, **BF16})
    policy = build_planned_policy(config, parallel.initialize(ParallelConfig(), pick_device("cpu"), seed=0))
    stored = HFFolder(glm).read(BIAS)
    assert not torch.equal(stored, stored.bfloat16().float())
    ((_, held),) = weight_buffers(policy.models[0])
    assert torch.equal(held, stored)
    assert not any("bias" in name and "router" in name for name, _ in policy.models[0].named_parameters())
    sent = dict(policy.export(embedded_plan(config.precision, 2)))
    assert torch.equal(sent[BIAS], stored) and sent["lm_head.weight"].dtype == torch.bfloat16
    kept = policy.copy_weights()
    held.zero_()
    policy.put_weights(kept)
    assert torch.equal(held, stored)


def test_an_engine_in_bfloat16_serves_the_bits_of_the_bias(glm: Path) -> None:
    served = read_weights(glm, AutoConfig.from_pretrained(glm), torch.bfloat16, torch.device("cpu")).model
    assert torch.equal(served.get_buffer(BIAS), HFFolder(glm).read(BIAS))
    assert served.lm_head.weight.dtype == torch.bfloat16


def test_layers_for_multi_token_prediction_are_carried_and_not_trained(with_mtp: Path, tmp_path: Path) -> None:
    source = check_folder(HFFolder(with_mtp))
    later = {name for name in source.folder.tensors if name.startswith("model.layers.2.")}
    assert set(source.unused) == later and not later & source.tensors.keys()
    config = make_config({"model": {"path": str(with_mtp)}})
    policy = build_planned_policy(config, parallel.initialize(ParallelConfig(), pick_device("cpu"), seed=0))
    policy.save_hf(tmp_path / "out")
    stored, written = load_file(with_mtp / SINGLE), load_file(tmp_path / "out" / SINGLE)
    assert stored.keys() == written.keys()
    assert all(torch.equal(stored[name], written[name]) for name in stored)


def test_an_engine_reads_a_folder_with_layers_for_multi_token_prediction(with_mtp: Path) -> None:
    read = read_weights(with_mtp, AutoConfig.from_pretrained(with_mtp), torch.float32, torch.device("cpu"))
    assert read.digests.keys() == check_folder(HFFolder(with_mtp)).tensors.keys()


def test_codes_of_layers_that_are_carried_are_written_as_values(with_mtp: Path, tmp_path: Path) -> None:
    stored = load_file(with_mtp / SINGLE)
    name = "model.layers.2.self_attn.o_proj.weight"
    codes = stored[name].to(torch.float8_e4m3fn)
    config = config_of(with_mtp, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    (tmp_path / "config.json").write_text(json.dumps(config))
    rewritten(tmp_path, {**stored, name: codes, f"{name}_scale_inv": torch.full((1, 1), 0.5)})
    carried = dict(check_folder(HFFolder(tmp_path)).carried())
    assert f"{name}_scale_inv" not in carried
    assert torch.equal(carried[name], (codes.float() * 0.5).bfloat16())


def test_layers_that_config_json_does_not_announce_are_refused(with_mtp: Path, tmp_path: Path) -> None:
    rewritten(tmp_path, load_file(with_mtp / SINGLE))
    silent = {"num_nextn_predict_layers": 0, "num_mtp_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(config_of(with_mtp, **silent)))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\..* is not in the table"):
        check_folder(HFFolder(tmp_path))


def test_the_engines_dtypes_are_those_of_the_plan_except_for_buffers(glm: Path) -> None:
    source = check_folder(HFFolder(glm))
    dtypes = export_dtypes(embedded_plan(make_config({"model": {"path": "m"}, **BF16}).precision, 2), source)
    assert {name for name, dtype in dtypes.items() if dtype != torch.bfloat16} == source.buffers == {BIAS}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_topk_prob": False}, "'norm_topk_prob' is False"),
        ({"n_group": 4, "topk_group": 2}, "two experts for each of its groups"),
        ({"n_group": 3, "topk_group": 1}, "do not divide"),
        ({"num_experts_per_tok": 9}, "exceeds the number of experts, 8"),
        ({"first_k_dense_replace": 2}, "no layer is left with experts"),
        ({"topk_method": "greedy"}, "'topk_method' is 'greedy'"),
        ({"scoring_func": "softmax"}, "'scoring_func' is 'softmax'"),
        ({"num_local_experts": 9}, "contradict each other"),
    ],
)
def test_a_router_that_would_choose_otherwise_is_refused(glm: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: .*{words}"):
        read_family(config_of(glm, **changes), "config.json")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("moonlight", {"attention_bias": True}, "'attention_bias' is True"),
        ("moonlight", {"rope_interleave": False}, "'rope_interleave' is False"),
        ("moonlight", {"qk_rope_head_dim": 7}, "an even number is needed"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense", "linear"]}, "'dense' or 'sparse' for each of 2 layers"),
        ("glm4_moe_lite", {"first_k_dense_replace": 3}, "'first_k_dense_replace' is 3"),
    ],
)
def test_latent_attention_of_another_kind_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], words: str
) -> None:
    config = config_of(make_family(tmp_path, name))
    read_family(config, "config.json")
    with pytest.raises(ConfigError, match=rf"config\.json: .*{words}"):
        read_family(config | changes, "config.json")


def test_an_absent_query_rank_is_the_default_and_null_means_none(tmp_path: Path) -> None:
    config = config_of(make_family(tmp_path, "moonlight"))
    assert read_family(config | {"q_lora_rank": None}, "c")[1].latent.query_rank is None
    config.pop("q_lora_rank", None)
    assert read_family(config, "c")[1].latent.query_rank == AutoConfig.for_model("deepseek_v3").q_lora_rank


def test_what_is_not_tested_with_latent_attention_is_refused(tmp_path: Path) -> None:
    folder = make_family(tmp_path, "moonlight")
    shape = check_folder(HFFolder(folder)).shape

    def check(**sections: Any) -> None:
        check_shape(make_config({"model": {"path": str(folder)}, **sections}), shape)

    check(parallel={"tensor": 2, "sequence": True})
    with pytest.raises(ConfigError, match=r"latent attention needs parallel\.sequence: true"):
        check(parallel={"tensor": 2})
    with pytest.raises(PrecisionError, match=r"precision\.recipe: blockwise is not tested with latent attention"):
        check(precision={"train": "bf16", "recipe": "blockwise"})
    with pytest.raises(PrecisionError, match=r"precision\.rollout: fp8_blockwise is not tested with latent attention"):
        check(precision={"train": "bf16", "rollout": "fp8_blockwise"})
    with pytest.raises(ConfigError, match=r"run\.attribute_every"):
        check(run={"attribute_every": 5})
