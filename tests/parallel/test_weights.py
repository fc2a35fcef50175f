"""Any parallel layout loads a Hugging Face folder and exports it bit for bit on rank 0."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.config import PrecisionConfig
from megatron_rl.weights.digest import tensor_digest
from megatron_rl.weights.quantized import WireTensors
from tests.models import make_qwen3
from tests.parallel.group import RankGroup
from tests.policies import embedded_plan

TWO = [{"tensor": 2}, {"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}, {"data": 2}, {"context": 2}]
FOUR = [
    {"tensor": 4},
    {"pipeline": 4},
    {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence": True},
    {"tensor": 2, "context": 2},
    {"pipeline": 2, "data": 2},
]


def check(group: RankGroup, model: Path, layout: dict[str, Any], **options: Any) -> None:
    answers = group.run("tests.parallel.weight_steps", "round_trip", model=model, layout=layout, **options)
    stored = {name: tensor_digest(tensor) for name, tensor in load_file(model / "model.safetensors").items()}
    for names, digests, unfilled in answers:
        assert unfilled == []
        assert names == answers[0][0] and sorted(names) == sorted(stored)
        assert digests == (stored if digests is answers[0][1] else {})


@pytest.mark.parametrize("layout", TWO, ids=str)
def test_two_ranks_give_the_stored_bytes_back(two_ranks, qwen3, layout):
    check(two_ranks, qwen3, layout)


@pytest.mark.parametrize("layout", FOUR, ids=str)
def test_four_ranks_give_the_stored_bytes_back(four_ranks, qwen3, layout):
    check(four_ranks, qwen3, layout)


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}], ids=str)
def test_tied_embeddings_are_given_back_once(two_ranks, qwen3_tied, layout):
    check(two_ranks, qwen3_tied, layout)


def test_bfloat16_weights_are_given_back_in_bfloat16(four_ranks, tmp_path):
    model = make_qwen3(tmp_path, tied=True, dtype=torch.bfloat16)
    check(four_ranks, model, {"tensor": 2, "pipeline": 2})


@pytest.mark.parametrize("layout", [{"tensor": 2, "data": 2}, {"pipeline": 2, "context": 2}], ids=str)
def test_only_the_first_replica_is_exported(four_ranks, qwen3, layout):
    check(four_ranks, qwen3, layout, spoil_replicas=True)


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}], ids=str)
def test_a_quantized_export_is_that_of_the_whole_tensors(two_ranks, qwen3, layout):
    precision = {"train": "bf16", "rollout": "fp8_blockwise", "first_last_bf16": True}
    answers = two_ranks.run(
        "tests.parallel.weight_steps", "quantized_export", model=qwen3, layout=layout, precision=precision
    )
    stored = {name: tensor.bfloat16() for name, tensor in load_file(qwen3 / "model.safetensors").items()}
    plan = embedded_plan(PrecisionConfig(**precision), num_layers=4)
    sent = {name: tensor_digest(tensor) for name, tensor in WireTensors(stored.items(), plan)}
    assert answers == [sent, {}]
    assert (
        "model.layers.1.mlp.down_proj.weight_scale_inv" in sent
        and "model.layers.0.mlp.down_proj.weight_scale_inv" not in sent
    )
