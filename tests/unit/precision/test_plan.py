"""A precision plan states all number formats of a run, or raises an error with the reason, before any allocation."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from megatron_rl.config import Config, OptimizerConfig, SGLangConfig, make_config
from megatron_rl.errors import ConfigError, PrecisionError
from megatron_rl.plan.precision_check import check_precision, matrices
from megatron_rl.precision.machine import Machine, execution_mode
from megatron_rl.precision.plan_checks import BLOCK, Matrix, PlanReport, blocks_coincide, check_plan
from megatron_rl.precision.table import describe
from megatron_rl.trainer.preflight import resolve_on_rank
from megatron_rl.weights.families import ModelShape
from megatron_rl.weights.families.qwen3 import QWEN3
from megatron_rl.weights.families.rope import RopePlan
from megatron_rl.weights.name_table import entries
from tests.policies import embedded_plan

CPU = Machine()
HOPPER = Machine((9, 0), (13, 0), transformer_engine=True)
BLACKWELL = Machine((10, 0), (13, 0), transformer_engine=True)
UNIFIED = {"train": "bf16", "recipe": "blockwise", "rollout": "fp8_blockwise", "rollout_activations": "fp8"}


def shape(**changes: int) -> ModelShape:
    """Return a shape like Qwen3-4B with fewer layers: heads of 128, and every dimension is a multiple of 128."""
    fields = {
        "num_layers": 4, "hidden_size": 512, "num_heads": 8, "num_kv_heads": 4, "head_dim": 128,
        "ffn_hidden_size": 1024, "vocab_size": 100, "max_position_embeddings": 64,
    } | changes  # fmt: skip
    fixed = {"norm_eps": 1e-6, "rope": RopePlan(1e4, 16), "qk_norm": True, "tied_embeddings": False}
    return ModelShape(**fields, **fixed)


TINY = shape(hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=32, ffn_hidden_size=256)


def config(*, tensor: int = 1, urls: tuple[str, ...] = (), engine: str = "embedded", **precision: object) -> Config:
    sections = {"parallel": {"tensor": tensor}, "rollout": {"urls": urls, "engine": engine}, "precision": precision}
    return make_config({"model": {"path": "nowhere"}, **sections})


def report(model: ModelShape, machine: Machine = CPU, **settings: object) -> PlanReport:
    return check_precision(config(**settings), QWEN3, model, machine)


def printed(told: PlanReport) -> str:
    console = Console(width=120, highlight=False)
    with console.capture() as capture:
        console.print(describe(told))
    return capture.get()


# --- keys that contradict each other


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        ({"recipe": "delayed", "first_last_bf16": True}, "first_last_bf16.*delayed.*tensorwise"),
        ({"recipe": "tensorwise", "pow2_scales": True}, "pow2_scales.*tensorwise"),
        ({"recipe": "none", "pow2_scales": True}, "pow2_scales.*fp8_blockwise_pow2"),
        ({"recipe": "none", "format": "hybrid"}, "hybrid"),
        ({"recipe": "nvfp4", "format": "hybrid"}, "hybrid.*nvfp4"),
        ({"rollout": "bf16", "rollout_activations": "fp8"}, "rollout_activations.*bf16"),
        ({"rollout": "int8", "rollout_activations": "fp8"}, "rollout_activations.*int8"),
        (
            {"rollout": "nvfp4", "rollout_activations": "fp8"},
            "fp8 needs.*is nvfp4.*fp8_blockwise_pow2 or mxfp8.*or fp4",
        ),
        (
            {"rollout": "mxfp8", "rollout_activations": "fp4"},
            "fp4 needs.*is mxfp8.*take rollout: nvfp4, or.*none or fp8",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_a_configuration_error(precision, words):
    with pytest.raises(ConfigError, match=words):
        report(shape(), **precision)


def test_a_model_with_no_layer_left_to_quantize_is_refused():
    for precision in ({"recipe": "blockwise"}, {"rollout": "int8"}):
        with pytest.raises(PrecisionError, match="none of the model's 2 layers"):
            report(shape(num_layers=2), first_last_bf16=True, **precision)
        report(shape(num_layers=3), first_last_bf16=True, **precision)


def test_layers_that_are_kept_are_kept_on_both_sides():
    plan = embedded_plan(config(**UNIFIED, first_last_bf16=True).precision, 4)
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(4)]
    assert [plan.quantized(name) for name in names] == [False, True, True, False]
    assert {m.name.split(".")[2] for m in matrices(plan, entries(QWEN3, shape()), 1)} == {"1", "2"}


# --- devices


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4"])
def test_a_cpu_emulates_every_recipe_and_the_table_says_so(recipe):
    told = report(shape(), train="bf16", recipe=recipe)
    assert told.computed == "emulated" and "emulated" in printed(told)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_hopper_runs_the_recipes_of_fp8_itself(recipe):
    told = report(shape(), HOPPER, train="bf16", recipe=recipe)
    assert told.computed == "native" and "native" in printed(told)


@pytest.mark.parametrize("recipe", ["mxfp8", "nvfp4"])
def test_hopper_is_told_that_micro_scales_need_blackwell(recipe):
    with pytest.raises(PrecisionError, match=rf"{recipe} needs sm_100.*can run: delayed, tensorwise, blockwise;"):
        report(shape(), HOPPER, recipe=recipe)
    assert report(shape(), BLACKWELL, train="bf16", recipe=recipe).computed == "native"


def test_blackwell_has_blockwise_with_power_of_two_scales_alone():
    with pytest.raises(PrecisionError, match="pow2_scales: true"):
        execution_mode("blockwise", BLACKWELL)
    assert execution_mode("blockwise", BLACKWELL, pow2=True) == "native"


def test_older_devices_and_older_cuda_are_refused_by_name():
    with pytest.raises(PrecisionError, match=r"sm_80.*FP8 needs sm_89.*can run: none"):
        execution_mode("tensorwise", replace(HOPPER, capability=(8, 0)))
    with pytest.raises(PrecisionError, match=r"CUDA 12\.9"):
        execution_mode("blockwise", replace(HOPPER, cuda=(12, 4)))
    assert execution_mode("tensorwise", replace(HOPPER, capability=(8, 9))) == "native"


def test_cuda_without_transformer_engine_is_refused_since_it_would_train_in_bf16():
    with pytest.raises(PrecisionError, match=r"needs Transformer Engine.*megatron-rl\[gpu\]"):
        report(shape(), replace(HOPPER, transformer_engine=False), recipe="tensorwise")
    assert report(shape(), replace(HOPPER, transformer_engine=False), rollout="fp8_blockwise").computed == ""


# --- shapes


@pytest.mark.parametrize(
    "model", [shape(), TINY, shape(num_kv_heads=8, head_dim=96), shape(num_kv_heads=2, head_dim=64)]
)
@pytest.mark.parametrize("size", [1, 2])
def test_blocks_coincide_exactly_where_the_trainers_parameter_says_so(model, size):
    """The test traces every row of the trainer's parameters back to the Hugging Face matrix it comes from."""
    table = entries(QWEN3, model)
    found = {m.name: m for m in matrices(embedded_plan(config(**UNIFIED).precision, model.num_layers), table, size)}
    for entry in table[1:9]:
        names = [name for name in entry.rule.hf if name in found]
        if not names:
            continue
        wholes = [numbered(found[name], part) for part, name in enumerate(names)]
        readers = [lambda start, stop, dim=0, whole=whole: whole.narrow(dim, start, stop - start) for whole in wholes]
        shards = [entry.rule.layout.read(readers, rank, size) for rank in range(size)]
        for part, name in enumerate(names):
            same = all(blocks_are_whole(shard, part, wholes[part]) for shard in shards)
            assert blocks_coincide(found[name]) == same, found[name]


def numbered(matrix: Matrix, part: int) -> torch.Tensor:
    """Return a matrix whose elements are all distinct and also identify their part."""
    count = matrix.rows * matrix.columns
    return torch.arange(count).reshape(matrix.rows, matrix.columns) + part * 10**9


def blocks_are_whole(shard: torch.Tensor, part: int, whole: torch.Tensor) -> bool:
    blocks = {frozenset(b.flatten().tolist()) for rows in whole.split(BLOCK) for b in rows.split(BLOCK, 1)}
    held = [b.flatten() for rows in shard.split(BLOCK) for b in rows.split(BLOCK, 1)]
    return all(frozenset(b.tolist()) in blocks for b in held if (b // 10**9 == part).any())


def test_unified_fp8_is_recognized():
    told = report(shape(), **UNIFIED)
    assert told.apart == () and not told.warnings
    assert "unified: yes" in printed(told)


def test_a_small_model_still_runs_and_is_told_that_its_codes_are_not_the_trainers():
    told = report(TINY, **UNIFIED)
    assert len(told.apart) == 1
    assert told.apart[0].startswith("12 of 28 matrices")
    assert "model.layers.0.self_attn.q_proj.weight: its 64 rows" in told.apart[0]
    assert "unified: no, because" in printed(told)


def test_a_cut_off_the_grid_names_the_nearest_one_on_it():
    told = report(shape(ffn_hidden_size=640), tensor=2, **UNIFIED)
    (reason,) = told.apart
    assert reason.startswith("12 of 28 matrices") and "model.layers.0.mlp.gate_proj.weight: its 320 rows" in reason
    assert reason.endswith("the nearest parallel.tensor that works is 1")


def test_what_tensor_cores_cannot_multiply_is_an_error_that_names_tensor_and_dimension():
    model = shape(ffn_hidden_size=48)
    message = r"model\.layers\.0\.mlp\.down_proj\.weight: 24 columns per rank.*not divisible by 16.*works is 1$"
    with pytest.raises(PrecisionError, match=message):
        report(model, HOPPER, tensor=2, recipe="tensorwise")
    assert report(model, HOPPER, train="bf16", recipe="tensorwise").computed == "native"
    assert report(model, CPU, tensor=2, recipe="tensorwise").computed == "emulated"


def test_where_no_cut_works_the_error_says_so():
    with pytest.raises(
        PrecisionError, match=r"40 columns per rank.*no parallel\.tensor works: set precision\.recipe: none"
    ):
        report(shape(hidden_size=40), HOPPER, tensor=2, recipe="tensorwise")


def test_tokens_that_tensor_cores_cannot_multiply_are_refused_on_them_alone():
    low = config(train="bf16", recipe="blockwise").model_copy(
        update={"optimizer": OptimizerConfig(tokens_per_microbatch=1000)}
    )
    check_precision(low, QWEN3, shape(), CPU)
    with pytest.raises(
        PrecisionError, match=r"multiplies 1000 tokens a rank, which must be a multiple of 16.* part is 1008"
    ):
        check_precision(low, QWEN3, shape(), HOPPER)


def test_sglang_refuses_ragged_blocks_and_the_embedded_engine_takes_them():
    plan = embedded_plan(config(**UNIFIED).precision, TINY.num_layers)
    layouts = {1: tuple(matrices(plan, entries(QWEN3, TINY), 1))}
    settings = {"tensor": 1, "num_layers": 4, "computed": "emulated"}
    with pytest.raises(PrecisionError, match=r"k_proj\.weight: 64 rows not divisible by 128, which SGLang needs"):
        check_plan(plan, layouts, engine="sglang", foreign=False, tokens=16, **settings)
    assert not check_plan(plan, layouts, engine="embedded", foreign=False, tokens=16, **settings).warnings
    (warning,) = check_plan(plan, layouts, engine="embedded", foreign=True, tokens=16, **settings).warnings
    assert "k_proj" in warning and "would refuse" in warning


def test_blocks_are_whole_on_each_rank_of_a_server():
    two = {"rollout": {"engine": "sglang", "sglang": {"tensor": 2}}, "precision": UNIFIED}
    made = make_config({"model": {"path": "nowhere"}, **two})
    check_precision(made, QWEN3, shape(), HOPPER)
    with pytest.raises(
        PrecisionError,
        match=r"gate_proj\.weight: 192 rows on each of 2 ranks of a server not divisible by 128.*sglang\.tensor",
    ):
        check_precision(made, QWEN3, shape(ffn_hidden_size=384), HOPPER)
    # Servers of 4 ranks hold each of 2 heads of keys twice.
    four = made.model_copy(
        update={"rollout": made.rollout.model_copy(update={"sglang": SGLangConfig(tensor=4)})},
    )
    check_precision(four, QWEN3, shape(num_kv_heads=2), HOPPER)


def test_tokens_that_are_gathered_in_bf16_are_a_warning_where_they_are_gathered():
    keys = {"precision": {"train": "bf16", "recipe": "blockwise"}, "optimizer": {"tokens_per_microbatch": 4160}}
    for sequence, machine, told in ((True, HOPPER, 1), (True, CPU, 0), (False, HOPPER, 0)):
        layout = {"tensor": 2, "sequence": sequence}
        made = make_config({"model": {"path": "nowhere"}, "parallel": layout, **keys})
        found = check_precision(made, QWEN3, shape(), machine).warnings
        assert sum("a rank has 2080 tokens" in warning for warning in found) == told


@pytest.mark.parametrize("rollout", ["fp8_blockwise", "fp8_blockwise_pow2"])
def test_sglang_on_blackwell_would_quantize_the_trainer_s_codes_again_so_it_is_refused(rollout: str):
    keys = {"train": "bf16", "rollout": rollout, "rollout_activations": "fp8"}
    with pytest.raises(PrecisionError, match=rf"{rollout} on sm_100: SGLang .* quantizes .* again.*rollout: bf16"):
        report(shape(), BLACKWELL, engine="sglang", **keys)
    report(shape(), BLACKWELL, engine="embedded", **keys)
    report(shape(), HOPPER, engine="sglang", **keys)
    report(shape(), BLACKWELL, engine="sglang", train="bf16", rollout="bf16")


def test_sglang_on_cpu_is_sent_dequantized_values_of_whatever_shape_and_the_user_is_told():
    told = report(TINY, engine="sglang", train="bf16", recipe="blockwise", rollout="fp8_blockwise")
    assert told.plan.dequantized and not told.warnings
    said = printed(told)
    assert (
        "SGLang on CPU takes no codes: it is sent the values of fp8_128x128_e4m3, dequantized, and multiplies in bf16"
        in said
    )
    assert "rollout_activations" not in said, "it could not be honored"
    with pytest.raises(PrecisionError, match="k_proj"):
        report(TINY, HOPPER, engine="sglang", **UNIFIED)
    assert not report(shape(), HOPPER, engine="sglang", **UNIFIED).plan.dequantized


@pytest.mark.parametrize("rollout", ["mxfp8", "nvfp4"])
def test_sglang_on_a_gpu_refuses_the_emulated_formats_and_on_cpu_is_sent_their_values(rollout):
    with pytest.raises(PrecisionError, match=f"{rollout} is emulated, and SGLang.*sm_100.*rollout.engine: embedded"):
        report(shape(), HOPPER, engine="sglang", rollout=rollout)
    assert report(shape(), engine="sglang", rollout=rollout).plan.dequantized
    assert not report(shape(), rollout=rollout).plan.dequantized


def test_unified_mxfp8_is_recognized_and_four_bits_are_told_to_differ_in_the_tensors_scale():
    mxfp8 = {"train": "bf16", "recipe": "mxfp8", "rollout": "mxfp8", "rollout_activations": "fp8"}
    assert report(TINY, **mxfp8).apart == () and report(shape(), tensor=2, **mxfp8).apart == ()
    (reason,) = report(shape(ffn_hidden_size=80), tensor=2, **mxfp8).apart
    assert (
        "down_proj.weight: 40 columns per rank not divisible by 32; the nearest parallel.tensor that works is 1"
        in reason
    )
    assert "rollout_activations: fp8" in report(TINY, **mxfp8 | {"rollout_activations": "none"}).apart[0]
    nvfp4 = {"train": "bf16", "recipe": "nvfp4", "rollout": "nvfp4", "rollout_activations": "fp4"}
    weights, inputs = report(shape(), **nvfp4).apart
    assert weights.startswith("20 of 28 matrices") and "the fp32 scale is that of" in weights
    assert weights.endswith("no parallel.tensor mends it")
    assert inputs == "inputs are nvfp4 in the trainer and nvfp4_token in the engines"


# --- pairs that cannot match


def test_scales_of_two_kinds_are_a_warning_that_says_which_key_to_change():
    (warning,) = report(shape(), **UNIFIED | {"rollout": "fp8_blockwise_pow2"}).warnings
    assert "99 %" in warning and "precision.pow2_scales: true, or precision.rollout: fp8_blockwise" in warning
    told = report(shape(), **UNIFIED, pow2_scales=True)
    (warning,) = told.warnings
    assert "precision.pow2_scales: false, or precision.rollout: fp8_blockwise_pow2" in warning
    assert "warning: the trainer's scales are power-of-two" in printed(told)
    assert not report(shape(), **UNIFIED | {"rollout": "fp8_blockwise_pow2"}, pow2_scales=True).warnings


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        ({"rollout": "fp8_blockwise"}, ["the trainer multiplies in fp32 (precision.recipe: none)"]),
        ({"recipe": "tensorwise", "rollout": "bf16"}, ["the engines multiply in bf16 (precision.rollout: bf16)"]),
        ({"recipe": "tensorwise", "rollout": "int8"}, ["weights are fp8_tensor_e4m3", "inputs are fp8_tensor_e4m3"]),
        (UNIFIED | {"rollout_activations": "none"}, ["precision.rollout_activations: fp8"]),
    ],
)
def test_every_reason_why_both_sides_differ_is_said(precision, words):
    told = report(shape(), **precision)
    assert len(told.apart) == len(words) and all(word in said for word, said in zip(words, told.apart, strict=True))


def test_half_precision_on_one_side_alone_is_noted():
    assert "rollout: fp16" in report(shape(), train="fp16", rollout="bf16").warnings[0]
    assert "65504" in report(shape(), train="bf16", rollout="fp16").warnings[0]
    assert not report(shape(), train="fp16", rollout="fp16").warnings


def test_a_key_without_effect_is_noted():
    assert "no effect" in report(shape(), first_last_bf16=True).warnings[0]


# --- the table


def test_a_run_without_low_precision_has_one_line():
    assert (
        printed(report(shape(), train="bf16", rollout="bf16"))
        == "precision: bf16 in the trainer, bf16 in the engines\n"
    )


def test_the_table_has_every_class_of_tensors_on_a_terminal_of_80_columns():
    console = Console(width=80, highlight=False)
    with console.capture() as capture:
        console.print(describe(report(shape(), **UNIFIED, first_last_bf16=True, format="hybrid")))
    rows = {line[:20].strip(): line[20:].split() for line in capture.get().splitlines() if line.strip()}
    assert rows["matrices of"] == ["layers", "1-2", "layers", "0,", "3", "all", "else"]
    assert rows["trainer: inputs"] == rows["engine: inputs"] == ["fp8_1x128_e4m3", "bf16", "bf16"]
    assert rows["trainer: gradients"] == ["fp8_1x128_e5m2", "bf16", "bf16"]
    for name in ("trainer: weights", "wire", "engine: weights"):
        assert rows[name] == ["fp8_128x128_e4m3", "bf16", "bf16"]
    assert rows["engine: KV cache"] == ["bf16", "bf16", "-"]


# --- where it is checked


def test_a_rank_of_a_cluster_checks_the_plan_by_itself_and_all_ranks_say_the_same(qwen3):
    def settings(**precision: object) -> Config:
        return make_config({"model": {"path": str(qwen3)}, "precision": precision})

    assert resolve_on_rank(settings(rollout="bf16", train="bf16")).report.apart is None
    assert resolve_on_rank(settings(**UNIFIED)).report.num_layers == 4
    with pytest.raises(ConfigError, match="pow2_scales") as refused:
        resolve_on_rank(settings(pow2_scales=True))
    assert refused.value.everywhere
