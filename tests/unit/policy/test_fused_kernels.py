"""A GPU gets other layers and fused kernels only where they compute the same."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megatron_rl.config import ParallelConfig, make_config
from megatron_rl.errors import ConfigError, PrecisionError
from megatron_rl.plan.precision_check import check_precision
from megatron_rl.policy.fused_kernels import (
    fuse_weight_gradients,
    fused_kernels,
    overlaps_gradients,
)
from megatron_rl.precision.machine import Machine, uses_transformer_engine
from megatron_rl.precision.plan import DTYPES
from megatron_rl.weights.families import read_family
from megatron_rl.weights.hf_folder import HFFolder
from tests.families import FAMILIES_AT_TOY_SIZE, SIZES

HOPPER = Machine((9, 0), (13, 0), transformer_engine=True, gpus=1)


def test_float32_on_a_gpu_has_local_layers_because_the_products_of_transformer_engine_would_be_tf32():
    chosen = {dtype: uses_transformer_engine(dtype, HOPPER) for dtype in DTYPES.values()}
    assert chosen == {torch.float32: False, torch.bfloat16: True, torch.float16: True}
    assert not uses_transformer_engine(torch.bfloat16, replace(HOPPER, transformer_engine=False))
    assert not uses_transformer_engine(torch.bfloat16, Machine())


FUSED = {"bias_activation_fusion", "apply_rope_fusion", "moe_permute_fusion"}
# What the fused kernels of megatron-core 0.16.1 would compute in another way, or not at all.
UNFUSED = {
    "glm4": {"apply_rope_fusion"},  # interleaved dimensions
    "deepseek_v3": {"apply_rope_fusion"},  # latent attention
    "gpt_oss": {"bias_activation_fusion"},  # another activation
}


@pytest.mark.parametrize("name", ["qwen2", "llama3", "mistral", "glm4", "qwen3_yarn", "deepseek_v3", "gpt_oss"])
def test_kernels_are_fused_on_a_gpu_where_they_compute_the_family_s_function(name: str):
    kind, keys = FAMILIES_AT_TOY_SIZE[name]
    settings = CONFIG_MAPPING[kind](**{**SIZES, **keys}).to_dict()
    _, shape = read_family(settings | {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]}, name)
    known = FUSED if shape.experts is not None else FUSED - {"moe_permute_fusion"}
    chosen = fused_kernels(shape, te=True, cuda=True)
    assert {key for key in known if not chosen[key]} == UNFUSED.get(name, set())
    for te, cuda in ((False, True), (True, False), (False, False)):
        assert not any(fused_kernels(shape, te=te, cuda=cuda)[key] for key in known)


def test_gradients_are_summed_during_backward_where_there_are_replicas_on_gpus():
    chosen = [overlaps_gradients(ParallelConfig(**sizes), te=True, cuda=True) for sizes in ({}, {"data": 2})]
    assert chosen == [False, True]
    assert overlaps_gradients(ParallelConfig(context=2), te=True, cuda=True)
    assert not overlaps_gradients(ParallelConfig(data=2), te=False, cuda=True)  # local experts without tokens
    assert not overlaps_gradients(ParallelConfig(data=2), te=True, cuda=False)


def test_only_linears_of_transformer_engine_add_into_the_buffers():
    linear, plain = nn.Linear(2, 2), nn.Linear(2, 2)
    linear.fuse_wgrad_accumulation = False
    model = nn.Sequential(linear, plain)
    assert fuse_weight_gradients([model]) == 1
    assert linear.fuse_wgrad_accumulation and not hasattr(plain, "fuse_wgrad_accumulation")


@pytest.mark.parametrize(
    ("precision", "machine", "error", "words"),
    [
        ({"recipe": "blockwise"}, HOPPER, PrecisionError, "blockwise on a GPU needs precision.train: bf16"),
        ({"attention": "flash"}, HOPPER, ConfigError, "attention: flash is a kernel of Transformer Engine"),
        ({"attention": "fused", "train": "bf16"}, Machine(), ConfigError, "leave it at auto"),
    ],
    ids=["fp32 recipe", "fp32 attention", "cpu"],
)
def test_keys_of_layers_that_the_trainer_lacks_are_refused(precision, machine, error, words, qwen3):
    config = make_config({"model": {"path": str(qwen3)}, "precision": precision})
    family, shape = read_family(HFFolder(qwen3).config, "qwen3")
    with pytest.raises(error, match=words):
        check_precision(config, family, shape, machine)
    fitting = make_config({"model": {"path": str(qwen3)}, "precision": {"attention": "flash", "train": "bf16"}})
    check_precision(fitting, family, shape, HOPPER)
