"""megatron-core's configuration has the recipe for Transformer Engine and leaves the plan's kept layers in bf16."""

import pytest
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.config import make_config
from megatron_rl.policy.quantized_products import transformer_engine_recipe
from tests.policies import embedded_plan

LAYERS = 4


def section(precision, **others):
    config = make_config({"model": {"path": "unused"}, "precision": precision, **others})
    return config, embedded_plan(config.precision, LAYERS)


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ({"recipe": "tensorwise", "format": "hybrid"}, {"fp8": "hybrid", "fp8_recipe": "tensorwise", "fp4": None}),
        ({"recipe": "mxfp8", "first_last_bf16": True}, {"fp8": "e4m3", "fp8_recipe": "mxfp8", "fp4": None}),
        ({"recipe": "delayed"}, {"fp8": "e4m3", "fp8_recipe": "delayed", "fp8_amax_history_len": 1, "fp8_margin": 0}),
        ({"recipe": "nvfp4", "first_last_bf16": True}, {"fp8": None, "fp4": "e2m1", "fp4_recipe": "nvfp4"}),
        ({"recipe": "none"}, {"fp8": None, "fp4": None}),
    ],
    ids=lambda value: value.get("recipe", ""),
)
def test_megatron_core_takes_the_recipe_and_keeps_the_layers_of_the_plan(precision, expected):
    config, plan = section(precision)
    fields = transformer_engine_recipe(config, plan)
    core = TransformerConfig(num_layers=LAYERS, hidden_size=64, num_attention_heads=4, **fields)
    assert {name: getattr(core, name) for name in expected} == expected
    assert {layer for layer in range(LAYERS) if is_first_last_bf16_layer(core, layer)} == plan.kept
