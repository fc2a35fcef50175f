"""A megatron-core GPTModel is loaded from a Hugging Face folder and exported again without a changed bit."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_rl.config import ParallelConfig, make_config
from megatron_rl.errors import CheckpointError
from megatron_rl.policy import parallel
from megatron_rl.policy.device_port import pick_device
from megatron_rl.policy.model import PolicyModel
from megatron_rl.weights.export import export_weights
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.hf_model import check_folder
from megatron_rl.weights.load_weights import load_weights
from tests.models import make_qwen3
from tests.policies import build_planned_chunks


@pytest.fixture(scope="module")
def mesh() -> parallel.Mesh:
    return parallel.initialize(ParallelConfig(), pick_device("cpu"), seed=0)


class Case:
    """One folder and a model built for it whose parameters are all NaN."""

    def __init__(self, path: Path, mesh: parallel.Mesh) -> None:
        self.source = check_folder(HFFolder(path))
        self.family, self.shape = self.source.family, self.source.shape
        self.model: PolicyModel = build_planned_chunks(make_config({"model": {"path": str(path)}}), self.shape, mesh)[0]
        for parameter in self.model.parameters():
            nn.init.constant_(parameter, float("nan"))

    def load(self, *chunks: nn.Module, tp_size: int = 1) -> None:
        load_weights(chunks or [self.model], self.source, tp_rank=0, tp_size=tp_size)

    def export(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor | None]]:
        dtypes = {name: dtype or stored for name, stored in self.source.dtypes.items()}
        return export_weights([self.model], self.family, self.shape, dtypes=dtypes)

    def untouched(self) -> bool:
        return all(bool(torch.isnan(parameter).all()) for parameter in self.model.parameters())


@pytest.fixture
def case(qwen3: Path, mesh: parallel.Mesh) -> Case:
    return Case(qwen3, mesh)


def assert_identical(case: Case, exported: list[tuple[str, torch.Tensor | None]]) -> None:
    assert sorted(name for name, _ in exported) == sorted(case.source.tensors)
    for name, tensor in exported:
        stored = case.source.read(name)
        assert tensor is not None and tensor.dtype == stored.dtype and tensor.shape == stored.shape
        assert torch.equal(tensor.view(-1).view(torch.uint8), stored.view(-1).view(torch.uint8)), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_and_exporting_gives_the_stored_bytes(
    tmp_path: Path, mesh: parallel.Mesh, tied: bool, dtype: torch.dtype
) -> None:
    case = Case(make_qwen3(tmp_path, tied=tied, layers=2, dtype=dtype), mesh)
    case.load()
    assert not any(bool(torch.isnan(parameter).any()) for parameter in case.model.parameters())
    assert_identical(case, list(case.export()))


def test_an_export_in_another_dtype_is_the_cast_of_the_parameters(case: Case) -> None:
    case.load()
    for name, tensor in case.export(torch.bfloat16):
        assert tensor is not None and torch.equal(tensor, case.source.read(name).bfloat16())


def test_an_export_shows_a_changed_parameter(case: Case) -> None:
    case.load()
    with torch.no_grad():
        case.model.decoder.layers[1].mlp.linear_fc1.weight[96] += 1  # the first row of up, after 96 rows of gate
    changed = {
        name: (tensor - case.source.read(name)).nonzero() for name, tensor in case.export() if tensor is not None
    }
    assert {name: rows[:, 0].unique().tolist() for name, rows in changed.items() if len(rows)} == {
        "model.layers.1.mlp.up_proj.weight": [0]
    }


def test_norms_fused_into_the_following_linear_load_and_export_alike(case: Case) -> None:
    for layer in case.model.decoder.layers:
        for norm, linear in (
            (layer.input_layernorm, layer.self_attention.linear_qkv),
            (layer.pre_mlp_layernorm, layer.mlp.linear_fc1),
        ):
            linear.layer_norm_weight = nn.Parameter(norm.weight.detach().clone())
        layer.input_layernorm, layer.pre_mlp_layernorm = nn.Identity(), nn.Identity()
    case.load()
    assert_identical(case, list(case.export()))


def test_wrapped_chunks_are_looked_into(case: Case) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    case.load(Wrapper(Wrapper(case.model)))
    assert_identical(case, list(case.export()))


def test_a_parameter_without_a_rule_is_named_before_any_changes(case: Case) -> None:
    case.model.decoder.layers[1].mlp.linear_fc2.bias = nn.Parameter(torch.full((64,), float("nan")))
    with pytest.raises(CheckpointError, match=r"'decoder\.layers\.1\.mlp\.linear_fc2\.bias' of the model has no rule"):
        case.load()
    assert case.untouched()


def test_a_stored_tensor_the_model_has_no_parameter_for_is_named(case: Case) -> None:
    case.model.decoder.layers[2].self_attention.q_layernorm = nn.Identity()
    with pytest.raises(
        CheckpointError, match=r"no parameter 'decoder\.layers\.2\.self_attention\.q_layernorm\.weight'"
    ):
        case.load()
    assert case.untouched()


def test_a_model_built_for_another_layout_is_refused(case: Case) -> None:
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight' .* shape \[259, 64\] .* gives \[130, 64\]"):
        case.load(tp_size=2)
    assert case.untouched()


def test_one_layer_in_two_chunks_is_refused(case: Case) -> None:
    with pytest.raises(CheckpointError, match="in two chunks"):
        case.load(case.model, case.model)


def test_a_module_without_layers_is_not_a_model(case: Case) -> None:
    with pytest.raises(CheckpointError, match="a Linear without a decoder"):
        case.load(nn.Linear(2, 2))


def test_an_export_of_too_few_layers_is_refused(case: Case) -> None:
    case.load()
    del case.model.decoder.layers[3]
    with pytest.raises(CheckpointError, match=r"'decoder\.layers\.3\.input_layernorm\.weight' is held by ranks \[\]"):
        case.export()


def test_an_export_without_a_dtype_for_a_tensor_is_refused(case: Case) -> None:
    case.load()
    with pytest.raises(CheckpointError, match=r"no dtype is given for tensor 'model\.embed_tokens\.weight'"):
        export_weights([case.model], case.family, case.shape, dtypes={})
