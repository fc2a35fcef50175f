"""The embedded engine serves quantized weights from a high-precision folder or from codes.

Inputs are quantized or not.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3MoeConfig

from megatron_rl.errors import CheckpointError, PrecisionError
from megatron_rl.precision.formats import fake_quantize, quantize
from megatron_rl.protocol.server_options import EngineQuantization
from megatron_rl.server.decode_batch import Sampling
from megatron_rl.server.engine import Engine
from megatron_rl.server.requests import make_job
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.quantized import WireTensors, quantization_config
from megatron_rl.weights.write_folder import write_hf_folder

SIZES = {
    "vocab_size": 90,
    "hidden_size": 160,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
PROMPT = [5, 9, 11, 40]
FP8, POW2, INT8 = "fp8_128x128_e4m3", "fp8_128x128_e4m3_pow2", "int8_channel"
MX, FP4 = "mxfp8_e4m3", "nvfp4_16x16"
INPUTS = {FP8: "fp8_1x128_e4m3", POW2: "fp8_1x128_e4m3_pow2", MX: "mxfp8_e4m3", FP4: "nvfp4_token"}
ROLLOUT = {FP8: "fp8_blockwise", POW2: "fp8_blockwise_pow2", INT8: "int8", MX: "mxfp8", FP4: "nvfp4"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 model, whose q, k and v projections have biases."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "hf"
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES, tie_word_embeddings=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.save_pretrained(path)
    return path


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            yield name, module


def reference(folder: Path, weights: str | None, inputs: str | None = None, kept: tuple[int, ...] = ()) -> nn.Module:
    """Return the transformers model in fp32, its linears on bf16-rounded and then fake-quantized weights and inputs."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, linear in linears(model):
        if weights is None or any(f".layers.{layer}." in name for layer in kept):
            continue
        linear.weight.data = fake_quantize(linear.weight.data.bfloat16(), weights, torch.float32)
        if inputs is not None:
            linear.register_forward_pre_hook(lambda _, args: (flat_quantized(args[0], inputs),))
    return model


def flat_quantized(x: Tensor, fmt: str) -> Tensor:
    return fake_quantize(x.flatten(0, -2), fmt).view_as(x)


def greedy(engine: Engine, tokens: int = 12) -> tuple[list[int], Tensor]:
    sampling = Sampling(max_new_tokens=tokens, seed=1)
    row = engine.submit([make_job(engine, PROMPT, sampling)])[0].result(60).rows[0]
    return row.tokens, torch.tensor(row.logprobs)


@torch.no_grad()
def logp(model: nn.Module, output: list[int]) -> Tensor:
    logp_TV = torch.log_softmax(model(torch.tensor([PROMPT + output])).logits[0].float(), -1)
    return logp_TV[len(PROMPT) - 1 : -1].gather(1, torch.tensor(output)[:, None])[:, 0]


def started(folder: Path, *args: object, **options: object) -> Engine:
    return Engine(folder, "fp32", engine_quantization=EngineQuantization(*args, **options)).start()


@pytest.mark.parametrize("wire", ROLLOUT)
def test_weights_alone_are_quantized_as_in_a_plain_forward_pass_over_their_values(folder: Path, wire: str) -> None:
    engine = started(folder, ROLLOUT[wire])
    output, found = greedy(engine)
    engine.stop()
    torch.testing.assert_close(found, logp(reference(folder, wire), output), atol=1e-4, rtol=0)
    assert (found - logp(reference(folder, None), output)).abs().max() > 1e-2


@pytest.mark.parametrize("wire", INPUTS)
def test_inputs_are_quantized_too_when_asked_for(folder: Path, wire: str) -> None:
    """A code may change if two sums differ in their last bit, so a few tokens differ by a little."""
    engine = started(folder, ROLLOUT[wire], "fp4" if wire == FP4 else "fp8")
    output, found = greedy(engine, 40)
    engine.stop()
    error = (found - logp(reference(folder, wire, INPUTS[wire]), output)).abs()
    without = (found - logp(reference(folder, wire), output)).abs()
    assert error.mean() < 0.2 * without.mean()


def test_the_first_and_the_last_layer_can_be_spared(folder: Path) -> None:
    engine = started(folder, "fp8_blockwise", first_last_bf16=True)
    output, found = greedy(engine)
    engine.stop()
    torch.testing.assert_close(found, logp(reference(folder, FP8, kept=(0, 2)), output), atol=1e-4, rtol=0)


@pytest.mark.parametrize("wire", ROLLOUT)
def test_codes_from_a_trainer_and_quantizing_at_load_serve_the_same(folder: Path, tmp_path: Path, wire: str) -> None:
    engine = started(folder, ROLLOUT[wire])
    at_load = greedy(engine)
    source, plan = HFFolder(folder), EngineQuantization(ROLLOUT[wire]).plan(3, "fp32")
    exported = (
        (name, source.read(name).bfloat16() if plan.quantized(name) else source.read(name)) for name in source.tensors
    )
    config = quantization_config(plan, source.tensors)
    digests = write_hf_folder(
        tmp_path / "v1", WireTensors(exported, plan), source, manifest_version=1, quantization=config
    )
    engine.update_from_disk(tmp_path / "v1", "1")
    tokens, logprobs = greedy(engine)
    assert tokens == at_load[0] and torch.equal(logprobs, at_load[1])
    assert engine.checksums() == ("1", digests)
    fresh = started(tmp_path / "v1", ROLLOUT[wire])
    assert torch.equal(greedy(fresh)[1], logprobs)
    engine.stop()
    fresh.stop()
    with pytest.raises(
        CheckpointError, match=r"config\.json has a quantization_config .* start it with --quantization"
    ):
        Engine(tmp_path / "v1")


def test_float16_computes_in_float16(folder: Path) -> None:
    engine = Engine(folder, "fp16").start()
    output, found = greedy(engine)
    engine.stop()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).eval()
    torch.testing.assert_close(found, logp(model, output), atol=2e-2, rtol=0)
    assert not torch.equal(found, logp(reference(folder, None), output))


def test_inputs_of_a_model_without_such_linears_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(
        PrecisionError, match=r"tensor model\.layers\.0\.mlp\.experts\.0\.down_proj\.weight is not the weight"
    ):
        started(tmp_path, "fp8_blockwise", "fp8")


def test_an_engine_of_quantized_weights_serves_the_values_of_every_experts_codes(qwen3_moe: Path) -> None:
    """transformers holds the experts of a layer in one parameter.

    Each expert is quantized by itself, and the router is not quantized.
    """
    plain = load_file(qwen3_moe / "model.safetensors")
    served = (
        Engine(qwen3_moe, engine_quantization=EngineQuantization("fp8_blockwise"))
        ._batcher.weights.model.model.layers[2]
        .mlp
    )
    for expert in range(8):
        of = {
            kind: plain[f"model.layers.2.mlp.experts.{expert}.{kind}_proj.weight"].bfloat16()
            for kind in ("gate", "up", "down")
        }
        values = {kind: quantize(weight, "fp8_128x128_e4m3").dequantize() for kind, weight in of.items()}
        assert torch.equal(served.experts.gate_up_proj[expert], torch.cat([values["gate"], values["up"]]))
        assert torch.equal(served.experts.down_proj[expert], values["down"])
    assert torch.equal(served.gate.weight, plain["model.layers.2.mlp.gate.weight"])
