"""An export sends quantized weights, config.json states their format, and a reader refuses invalid ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_rl.config import ParallelConfig, PrecisionConfig, make_config
from megatron_rl.errors import CheckpointError
from megatron_rl.policy import parallel
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.device_port import pick_device
from megatron_rl.precision.finite import is_finite
from megatron_rl.precision.formats import fake_quantize, quantize
from megatron_rl.precision.fp4 import unpack_nibbles
from megatron_rl.precision.plan import DTYPES, PrecisionPlan
from megatron_rl.precision.products import operands_of
from megatron_rl.weights.digest import tensor_digest
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.layouts import QKV, GateUp, Layout, RowParallel
from megatron_rl.weights.quantized import (
    WireTensors,
    check_config,
    dequantize_tensors,
    quantization_config,
    quantize_at_load,
)
from megatron_rl.weights.write_folder import write_hf_folder
from tests.policies import build_planned_policy, embedded_plan

LAYERS = 3
WIRES = ["fp8_blockwise", "fp8_blockwise_pow2", "int8", "mxfp8", "nvfp4"]
SCALE = {"int8": "_scale", "nvfp4": "_scale"}  # all others: _scale_inv
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> HFFolder:
    """A float32, untied model whose matrices have more than one tile and ragged edges."""
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=160,
        intermediate_size=200,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=40,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("model") / "hf"
    Qwen3ForCausalLM(config).save_pretrained(path)
    return HFFolder(path)


def plan_of(rollout: str, **options: object) -> PrecisionPlan:
    return embedded_plan(PrecisionConfig(rollout=rollout, **options), LAYERS)


def stored(folder: HFFolder) -> dict[str, Tensor]:
    return {name: folder.read(name).clone() for name in folder.tensors}  # reads of one tensor share memory


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return tensor_digest(a) == tensor_digest(b)


def is_projection(name: str) -> bool:
    return name.endswith(tuple(f"{projection}.weight" for projection in PROJECTIONS))


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def policy(folder: HFFolder, request: pytest.FixtureRequest) -> Policy:
    config = make_config(
        {
            "model": {"path": str(folder.path)},
            "precision": {"train": request.param},
            "rollout": {"max_prompt_tokens": 16, "max_new_tokens": 16},
            "optimizer": {"tokens_per_microbatch": 64},
        }
    )
    return build_planned_policy(config, parallel.initialize(ParallelConfig(), pick_device("cpu"), seed=0))


@pytest.mark.parametrize(
    ("layout", "size", "equal"),
    [
        (QKV(8, 4, 128, (256,)), 1, True),
        (QKV(8, 4, 128, (256,)), 2, True),
        (GateUp(256, 160), 2, True),
        (RowParallel((160, 512), "intermediate_size"), 2, True),
        (QKV(8, 4, 64, (256,)), 1, False),
        (GateUp(320, 160), 2, False),
    ],
    ids=str,
)
def test_the_trainers_fused_and_sharded_tiles_have_the_wires_values_where_parts_begin_between_tiles(
    layout: Layout, size: int, equal: bool
) -> None:
    fmt, generator = plan_of("fp8_blockwise").wire, torch.Generator().manual_seed(1)
    shards = [torch.randn(layout.local_shape(size), generator=generator).bfloat16() for _ in range(size)]
    multiplied = layout.merge([fake_quantize(shard, fmt, torch.float32) for shard in shards])
    sent = [fake_quantize(tensor, fmt, torch.float32) for tensor in layout.merge(shards)]
    assert all(torch.equal(a, b) for a, b in zip(multiplied, sent, strict=True)) == equal


@pytest.mark.parametrize("first_last", [False, True])
@pytest.mark.parametrize("rollout", WIRES)
def test_an_export_sends_the_codes_and_scales_of_the_trainers_parameters(
    folder: HFFolder, policy: Policy, rollout: str, first_last: bool
) -> None:
    train = next(name for name, dtype in DTYPES.items() if dtype == policy.models[0].config.params_dtype)
    plan = plan_of(rollout, train=train, first_last_bf16=first_last)
    sent = dict(policy.export(plan))
    suffixes = [SCALE.get(rollout, "_scale_inv"), *["_scale_2"] * (rollout == "nvfp4")]
    coded = {name for name in folder.tensors if is_projection(name) and (not first_last or ".layers.1." in name)}
    assert sent.keys() == folder.tensors.keys() | {name + suffix for name in coded for suffix in suffixes}
    for name, tensor in stored(folder).items():
        trained = tensor.bfloat16() if train == "bf16" else tensor
        if name in coded:
            wanted = quantize(trained, plan.wire)
            codes = unpack_nibbles(wanted.codes, tensor.shape[1]) if rollout == "nvfp4" else wanted.codes
            scales = [wanted.scale_inv, wanted.global_scale_inv]
            assert same_bytes(sent[name], codes), name
            assert all(same_bytes(sent[name + s], scale) for s, scale in zip(suffixes, scales, strict=False)), name
        else:
            assert same_bytes(sent[name], trained.bfloat16()), name


def test_block_fp8_has_the_layout_that_sglang_reads(folder: HFFolder) -> None:
    sent = dict(WireTensors(stored(folder).items(), plan_of("fp8_blockwise")))
    assert (sent[DOWN].dtype, tuple(sent[DOWN].shape)) == (torch.float8_e4m3fn, (160, 200))
    scales = sent[f"{DOWN}_scale_inv"]
    assert (scales.dtype, tuple(scales.shape)) == (torch.float32, (2, 2))
    corner = folder.read(DOWN)[128:, 128:]
    values = sent[DOWN][128:, 128:].float() * scales[1, 1]
    assert (values - corner).abs().max() <= corner.abs().max() / 28  # half a step of the largest binade


def test_int8_has_one_scale_a_row(folder: HFFolder) -> None:
    sent = dict(WireTensors(stored(folder).items(), plan_of("int8")))
    assert (sent[DOWN].dtype, tuple(sent[DOWN].shape)) == (torch.int8, (160, 200))
    scales = sent[f"{DOWN}_scale"]
    assert (scales.dtype, tuple(scales.shape)) == (torch.float32, (160, 1))
    assert ((sent[DOWN].float() * scales - folder.read(DOWN)).abs() <= 0.501 * scales).all()


@pytest.mark.parametrize(
    ("recipe", "rollout"), [("blockwise", "fp8_blockwise"), ("mxfp8", "mxfp8"), ("nvfp4", "nvfp4")]
)
def test_engines_multiply_the_values_that_the_trainers_product_multiplies(
    folder: HFFolder, policy: Policy, recipe: str, rollout: str
) -> None:
    """Exactly, for every matrix that is one parameter of the trainer. nvfp4 has one scale a parameter, so no others."""
    train = next(name for name, dtype in DTYPES.items() if dtype == policy.models[0].config.params_dtype)
    plan = plan_of(rollout, train=train, recipe=recipe)
    operands = operands_of(plan)
    assert operands is not None
    served = dequantize_tensors(dict(policy.export(plan)), plan, "engine", torch.float32)
    layers = policy.models[0].decoder.layers
    of = {"self_attn.o_proj": "self_attention.linear_proj", "mlp.down_proj": "mlp.linear_fc2"}
    for layer in range(LAYERS):
        for part, parameter in of.items():
            weight = layers[layer].get_submodule(parameter).weight.detach()
            multiplied = quantize(weight, operands.weights).dequantize()
            assert torch.equal(served[f"model.layers.{layer}.{part}.weight"], multiplied), part
    fused = quantize(layers[0].mlp.linear_fc1.weight.detach(), operands.weights).dequantize()
    parts = torch.cat([served[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")])
    assert torch.equal(parts, fused) == (rollout == "mxfp8"), "200 rows are no whole tiles of 128 or 16"


@pytest.mark.parametrize("rollout", WIRES)
def test_the_dequantized_stream_has_the_values_of_the_codes(folder: HFFolder, rollout: str) -> None:
    plan = plan_of(rollout)
    values = dict(WireTensors(stored(folder).items(), plan, dequantized=True))
    joined = dequantize_tensors(dict(WireTensors(stored(folder).items(), plan)), plan, "here", torch.float32)
    assert values.keys() == joined.keys() == folder.tensors.keys()
    assert all(same_bytes(values[name], joined[name]) for name in values)
    assert not torch.equal(values[DOWN], folder.read(DOWN))


@pytest.mark.parametrize("train", ["fp32", "bf16"])
@pytest.mark.parametrize("rollout", WIRES)
def test_quantizing_at_load_gives_what_the_trainer_would_have_sent(folder: HFFolder, rollout: str, train: str) -> None:
    plan = plan_of(rollout, train=train)
    trained = {name: tensor.bfloat16() if train == "bf16" else tensor for name, tensor in stored(folder).items()}
    joined = dequantize_tensors(dict(WireTensors(trained.items(), plan)), plan, "here", torch.bfloat16)
    loaded = quantize_at_load(stored(folder), plan, torch.bfloat16)
    assert all(same_bytes(loaded[name], joined[name]) for name in loaded if plan.quantized(name))


def test_an_unquantized_plan_changes_nothing(folder: HFFolder) -> None:
    sent = dict(WireTensors(stored(folder).items(), plan_of("bf16")))
    assert sent.keys() == folder.tensors.keys()
    assert all(same_bytes(sent[name], folder.read(name)) for name in sent)
    assert quantization_config(plan_of("bf16"), folder.tensors) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rollout", WIRES)
def test_a_tensor_that_is_not_finite_is_named_and_the_stream_can_still_be_run_to_its_end(
    folder: HFFolder, rollout: str, value: float
) -> None:
    tensors = stored(folder)
    tensors[DOWN][3, 4] = value
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = value
    drawn: list[str] = []
    stream = WireTensors(((name, drawn.append(name) or tensor) for name, tensor in tensors.items()), plan_of(rollout))
    with pytest.raises(CheckpointError, match=f"'{DOWN}' holds values that are not finite"):
        for _ in stream:
            pass
    for _ in stream:
        pass
    assert drawn == list(tensors)


def test_ranks_without_the_tensors_draw_the_stream_to_its_end(folder: HFFolder) -> None:
    stream = WireTensors(((name, None) for name in folder.tensors), plan_of("int8"))
    assert dict(stream) == dict.fromkeys(folder.tensors)


def test_a_written_folder_says_how_it_is_quantized(folder: HFFolder, tmp_path: Path) -> None:
    plan = plan_of("fp8_blockwise", first_last_bf16=True)
    sent = dict(WireTensors(((name, tensor.bfloat16()) for name, tensor in stored(folder).items()), plan))
    stated = quantization_config(plan, folder.tensors)
    digests = write_hf_folder(tmp_path / "out", sent.items(), folder, manifest_version=3, quantization=stated)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor_digest(tensor) for name, tensor in written.items()} == digests
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    says = config["quantization_config"]
    assert (says["quant_method"], says["activation_scheme"], says["fmt"]) == ("fp8", "dynamic", "e4m3")
    assert says["weight_block_size"] == [128, 128] and "scale_fmt" not in says
    kept = {f"model.layers.{layer}.{part}.{name}" for layer in (0, 2) for part, name in PARTS}
    assert set(says["modules_to_not_convert"]) == {"lm_head"} | kept
    assert HFFolder(tmp_path / "out").tensors[DOWN].dtype == torch.float8_e4m3fn


PARTS = [("mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn", name) for name in PROJECTIONS]


def test_the_pow2_and_int8_folders_say_so(folder: HFFolder) -> None:
    assert quantization_config(plan_of("fp8_blockwise_pow2"), folder.tensors)["scale_fmt"] == "ue8m0"
    int8 = quantization_config(plan_of("int8"), folder.tensors)
    assert (int8["quant_method"], int8["format"], int8["ignore"]) == (
        "compressed-tensors",
        "int-quantized",
        ["lm_head"],
    )
    group = int8["config_groups"]["group_0"]
    assert group["weights"]["num_bits"] == 8 and group["weights"]["strategy"] == "channel"
    assert group["input_activations"] is None


@pytest.mark.parametrize("rollout", WIRES)
def test_a_config_of_another_format_is_refused(folder: HFFolder, rollout: str) -> None:
    for other in WIRES:
        stated = quantization_config(plan_of(other), folder.tensors)
        assert stated is not None
        if other == rollout:
            check_config(stated, plan_of(rollout), "config.json")
        else:
            with pytest.raises(CheckpointError, match=r"config\.json: quantization_config has"):
                check_config(stated, plan_of(rollout), "config.json")


def drop_scale(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{DOWN}_scale_inv"]


def extra_scale(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight_scale_inv"] = torch.ones(1, 2)


def zero_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}_scale_inv"][1, 0] = 0.0


def negative_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}_scale_inv"][1, 0] *= -1


def infinite_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}_scale_inv"][0, 1] = float("inf")


def nan_code(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN].view(torch.uint8)[5, 6] = 0xFF


def transposed_scales(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}_scale_inv"] = torch.ones(1, 4)


def uncoded(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN] = tensors[DOWN].bfloat16()


def half_scales(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}_scale_inv"] = tensors[f"{DOWN}_scale_inv"].bfloat16()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (drop_scale, f"tensor {DOWN}_scale_inv is missing"),
        (extra_scale, r"tensor lm_head\.weight_scale_inv is unexpected"),
        (zero_scale, f"tensor {DOWN}_scale_inv has scales that are not finite or not above 0"),
        (negative_scale, f"tensor {DOWN}_scale_inv has scales that are not finite or not above 0"),
        (infinite_scale, f"tensor {DOWN}_scale_inv has scales that are not finite or not above 0"),
        (nan_code, f"tensor {DOWN} has codes that are NaN"),
        (transposed_scales, rf"tensor {DOWN}_scale_inv has shape \[1, 4\], but .* needs \[2, 2\]"),
        (uncoded, f"tensor {DOWN} is torch.bfloat16, but fp8_128x128_e4m3 has codes of torch.float8_e4m3fn"),
        (half_scales, f"tensor {DOWN}_scale_inv is torch.bfloat16, but scales of fp8_128x128_e4m3 are torch.float32"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_reader_refuses_codes_and_scales_that_cannot_be_right(
    folder: HFFolder, spoil: Callable[[dict[str, Tensor]], None], words: str
) -> None:
    plan = plan_of("fp8_blockwise")
    tensors = dict(WireTensors(stored(folder).items(), plan))
    dequantize_tensors(tensors, plan, "here", torch.float32)
    spoil(tensors)
    with pytest.raises(CheckpointError, match=words):
        dequantize_tensors(tensors, plan, "here", torch.float32)


@pytest.mark.parametrize(
    ("rollout", "suffix", "spoil", "words"),
    [
        ("nvfp4", "_scale_2", None, f"tensor {DOWN}_scale_2 is missing"),
        ("nvfp4", "_scale_2", lambda t: t.zero_(), f"{DOWN}_scale_2 is not finite or not above 0"),
        ("nvfp4", "_scale_2", lambda t: t.double(), rf"{DOWN}_scale_2 is torch.float64 \[\], but"),
        ("nvfp4", "_scale_2", lambda t: t[None], r"torch.float32 \[1\], but it is one float32 number"),
        ("nvfp4", "_scale", lambda t: t.float(), f"{DOWN}_scale is torch.float32, but scales of nvfp4_16x16 are"),
        (
            "nvfp4",
            "_scale",
            lambda t: (-t.float()).to(t.dtype),
            f"{DOWN}_scale has scales that are not finite or below",
        ),
        ("nvfp4", "", lambda t: t.fill_(16), f"tensor {DOWN} has codes above 15"),
        ("mxfp8", "_scale_inv", lambda t: t.fill_(0xFF), f"{DOWN}_scale_inv has scales that are NaN"),
        ("mxfp8", "_scale_inv", lambda t: t[:, :1], r"has shape \[160, 1\], but .* needs \[160, 7\]"),
    ],
)
def test_a_reader_refuses_wrong_codes_and_scales_of_four_bits_and_micro_scales(
    folder: HFFolder, rollout: str, suffix: str, spoil: Callable[[Tensor], Tensor] | None, words: str
) -> None:
    tensors = dict(WireTensors(stored(folder).items(), plan_of(rollout)))
    right = tensors.pop(DOWN + suffix)
    if spoil is not None:
        tensors[DOWN + suffix] = spoil(right.clone())
    with pytest.raises(CheckpointError, match=words):
        dequantize_tensors(tensors, plan_of(rollout), "here", torch.float32)


def test_scales_between_powers_of_two_are_refused_where_only_those_are_allowed(folder: HFFolder) -> None:
    tensors = dict(WireTensors(stored(folder).items(), plan_of("fp8_blockwise")))
    with pytest.raises(CheckpointError, match="has scales that are no powers of two"):
        dequantize_tensors(tensors, plan_of("fp8_blockwise_pow2"), "here", torch.float32)


def test_finite_is_known_of_every_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    found = [is_finite(codes[i : i + 1].view(torch.float8_e4m3fn)) for i in range(256)]
    assert [i for i, finite in enumerate(found) if not finite] == [0x7F, 0xFF]
    found = [is_finite(codes[i : i + 1].view(torch.float8_e5m2)) for i in range(256)]
    assert [i & 0x7F for i, finite in enumerate(found) if not finite] == 2 * [0x7C, 0x7D, 0x7E, 0x7F]
    assert not is_finite(torch.tensor([1j, complex(0.0, float("inf"))]))
    assert is_finite(torch.tensor([1, -128], dtype=torch.int8))
    assert not is_finite(torch.tensor([1.0, float("nan")], dtype=torch.bfloat16))
