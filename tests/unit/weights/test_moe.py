"""The mixture-of-experts family reads its config.json, has its name table, and exports single experts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megatron_rl.config import ParallelConfig, make_config
from megatron_rl.errors import ConfigError, MegatronRLError, PrecisionError
from megatron_rl.policy import parallel
from megatron_rl.policy.device_port import pick_device
from megatron_rl.policy.expert_rules import check_experts
from megatron_rl.weights.export import export_weights
from megatron_rl.weights.families import Experts, read_family
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.hf_model import check_folder
from megatron_rl.weights.load_weights import load_weights
from megatron_rl.weights.name_table import entries
from tests.policies import build_planned_chunks, embedded_plan


def config_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text()) | changes


def shape_of(config: dict[str, Any]):
    return read_family(config, "config.json")[1]


def test_the_experts_are_read_from_the_config_of_transformers_4_and_of_5(qwen3_moe: Path) -> None:
    five = config_of(qwen3_moe)
    four = five | {"num_experts": five["num_local_experts"]}
    four.pop("num_local_experts")
    assert shape_of(five).experts == shape_of(four).experts == Experts(8, 2, 48, norm_topk_prob=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mlp_only_layers": [4]}, r"'mlp_only_layers' is \[4\], a list of layers below 4"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, "no layer is left with experts"),
        ({"decoder_sparse_step": 5}, "no layer is left with experts"),
        ({"num_experts": 9}, "contradict each other"),
        ({"shared_expert_intermediate_size": 64}, "'shared_expert_intermediate_size' is 64"),
        ({"num_experts_per_tok": 9}, "'num_experts_per_tok' = 9 exceeds the number of experts, 8"),
        ({"num_experts_per_tok": 1}, "every gate the constant 1"),
        ({"norm_topk_prob": 1}, "'norm_topk_prob' is 1"),
        ({"moe_intermediate_size": "48"}, "'moe_intermediate_size' is '48'"),
        ({"attention_bias": True}, "'attention_bias' is True"),
    ],
)
def test_a_mixture_that_is_not_supported_is_refused_naming_the_key(
    qwen3_moe: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: .*{words}"):
        shape_of(config_of(qwen3_moe, **changes))


def test_the_table_names_every_tensor_transformers_writes_once(qwen3_moe: Path) -> None:
    folder = HFFolder(qwen3_moe)
    model = check_folder(folder, tensor_parallel=2, expert_parallel=4)
    names = [name for entry in entries(model.family, model.shape) for name in entry.rule.hf]
    assert sorted(names) == sorted(folder.tensors) == sorted(model.tensors)


def test_experts_that_cannot_be_spread_are_refused(qwen3: Path, qwen3_moe: Path) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.expert = 3 does not divide the 8 experts"):
        check_folder(HFFolder(qwen3_moe), tensor_parallel=1, expert_parallel=3)
    with pytest.raises(ConfigError, match=r"parallel\.expert = 2 spreads experts, and .* is a dense model"):
        check_folder(HFFolder(qwen3), tensor_parallel=1, expert_parallel=2)
    with pytest.raises(ConfigError, match="expert: 4 must divide tensor x context x data = 6"):
        make_config({"model": {"path": "m"}, "parallel": {"expert": 4, "tensor": 2, "data": 3}})


def test_experts_are_quantized_for_the_engines_and_routers_never(qwen3_moe: Path) -> None:
    config = make_config(
        {"model": {"path": str(qwen3_moe)}, "precision": {"train": "bf16", "rollout": "fp8_blockwise"}}
    )
    plan = embedded_plan(config.precision, 4)
    quantized = {name for name in HFFolder(qwen3_moe).tensors if plan.quantized(name)}
    assert len(quantized) == 4 * (4 + 8 * 3)
    assert not any("mlp.gate." in name or "norm" in name or "lm_head" in name for name in quantized)


@pytest.mark.parametrize(
    ("sections", "error", "words"),
    [
        ({"parallel": {"tensor": 2}}, ConfigError, "needs parallel.sequence: true"),
        ({"precision": {"train": "bf16", "recipe": "blockwise"}}, PrecisionError, "those of experts are not supported"),
        ({"precision": {"train": "fp16"}}, PrecisionError, "one loss scale"),
        (
            {"precision": {"train": "bf16", "rollout": "fp8_blockwise", "rollout_activations": "fp8"}},
            PrecisionError,
            "not emulated for experts",
        ),
        ({"run": {"attribute_every": 5}}, ConfigError, "run.attribute_every"),
    ],
)
def test_what_does_not_go_with_experts_is_refused(
    qwen3_moe: Path, qwen3: Path, sections: dict[str, Any], error: type[MegatronRLError], words: str
) -> None:
    config = make_config({"model": {"path": str(qwen3_moe)}, **sections})
    with pytest.raises(error, match=words):
        check_experts(config, shape_of(config_of(qwen3_moe)))
    check_experts(config, shape_of(config_of(qwen3)))


def test_dense_layers_among_experts_have_no_routing_to_replay(qwen3_moe: Path) -> None:
    config = make_config({"model": {"path": str(qwen3_moe)}, "rollout": {"routing_replay": True}})
    with pytest.raises(ConfigError, match="needs experts in every layer"):
        check_experts(config, shape_of(config_of(qwen3_moe, mlp_only_layers=[0])))


def test_a_dense_model_has_no_routing_to_replay(qwen3: Path, qwen3_moe: Path) -> None:
    config = make_config({"model": {"path": str(qwen3)}, "rollout": {"routing_replay": True}})
    with pytest.raises(ConfigError, match=r"rollout\.routing_replay: true .* is a dense model"):
        check_experts(config, shape_of(config_of(qwen3)))
    check_experts(config, shape_of(config_of(qwen3_moe)))


class Case:
    def __init__(self, folder: Path) -> None:
        mesh = parallel.initialize(ParallelConfig(), pick_device("cpu"), seed=0)
        self.source = check_folder(HFFolder(folder))
        self.shape = self.source.shape
        self.model = build_planned_chunks(make_config({"model": {"path": str(folder)}}), self.shape, mesh)[0]

    def load(self) -> None:
        load_weights([self.model], self.source, tp_rank=0, tp_size=1)

    def changed(self) -> set[str]:
        """Return the names whose exported bits differ from those of the folder."""
        exported = export_weights([self.model], self.source.family, self.shape, dtypes=self.source.dtypes)
        found = {name: tensor for name, tensor in exported if tensor is not None}
        assert found.keys() == self.source.tensors.keys()
        return {name for name, tensor in found.items() if not torch.equal(tensor, self.source.read(name))}


def test_swapped_experts_are_seen_in_an_export(qwen3_moe: Path) -> None:
    case = Case(qwen3_moe)
    case.load()
    assert case.changed() == set()
    experts = case.model.decoder.layers[2].mlp.experts.local_experts
    one, other = experts[1].linear_fc2.weight, experts[5].linear_fc2.weight
    kept = one.data.clone()
    one.data.copy_(other.data)
    other.data.copy_(kept)
    assert case.changed() == {f"model.layers.2.mlp.experts.{n}.down_proj.weight" for n in (1, 5)}


def test_every_expert_gets_the_tensors_of_its_own_index(qwen3_moe: Path) -> None:
    case = Case(qwen3_moe)
    case.load()
    for index, expert in enumerate(case.model.decoder.layers[3].mlp.experts.local_experts):
        gate, up = expert.linear_fc1.weight.chunk(2)
        assert torch.equal(gate, case.source.read(f"model.layers.3.mlp.experts.{index}.gate_proj.weight"))
        assert torch.equal(up, case.source.read(f"model.layers.3.mlp.experts.{index}.up_proj.weight"))


def test_experts_under_the_names_of_grouped_products_load_and_export_alike(qwen3_moe: Path) -> None:
    """Transformer Engine's layers use these names."""
    case = Case(qwen3_moe)
    for layer in case.model.decoder.layers:
        grouped = nn.Module()
        for linear in ("linear_fc1", "linear_fc2"):
            holder = nn.Module()
            for index, expert in enumerate(layer.mlp.experts.local_experts):
                holder.register_parameter(
                    f"weight{index}", nn.Parameter(torch.full_like(getattr(expert, linear).weight, 7.0))
                )
            grouped.add_module(linear, holder)
        layer.mlp.experts = grouped
    case.load()
    assert case.changed() == set()
