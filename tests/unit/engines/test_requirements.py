"""A server with another precision than the run needs is refused."""

import pytest

from megatron_rl.config import PrecisionConfig
from megatron_rl.engines.requirements import check_server_precision
from megatron_rl.errors import PrecisionError
from megatron_rl.protocol.server_options import EngineQuantization, describe_precision

ASKED = PrecisionConfig(train="bf16", rollout="fp8_blockwise", rollout_activations="fp8")


def embedded(dtype: str, engine_quantization: EngineQuantization | None) -> dict[str, object]:
    return {"engine": "embedded", **describe_precision(dtype, engine_quantization)}


def test_an_engine_that_serves_what_the_run_asks_for_is_taken() -> None:
    check_server_precision("http://e", embedded("bf16", EngineQuantization.of(ASKED)), ASKED)
    check_server_precision("http://e", embedded("fp16", None), PrecisionConfig(rollout="fp16"))
    check_server_precision("http://e", {"dtype": "bfloat16", "quantization": "fp8"}, ASKED)
    check_server_precision("http://e", {"dtype": "float32", "quantization": None}, PrecisionConfig())


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (embedded("bf16", None), "quantization None instead of fp8_blockwise"),
        (embedded("fp32", EngineQuantization.of(ASKED)), "dtype fp32 instead of bf16"),
        (embedded("bf16", EngineQuantization("fp8_blockwise")), "activations none instead of fp8"),
        (embedded("bf16", EngineQuantization("fp8_blockwise", "fp8", True)), "first_last_bf16 True instead of False"),
        (embedded("bf16", EngineQuantization("fp8_blockwise_pow2", "fp8")), "quantization fp8_blockwise_pow2 instead"),
        (
            embedded("bf16", EngineQuantization("fp8_blockwise", "fp8", False, "fp32")),
            "trainer_dtype fp32 instead of bf16",
        ),
        ({"dtype": "auto", "quantization": "fp8"}, "dtype auto instead of bfloat16"),
        ({"dtype": "bfloat16", "quantization": None}, "quantization None instead of fp8"),
    ],
)
def test_an_engine_that_serves_another_precision_is_refused_by_its_url(info: dict[str, object], words: str) -> None:
    with pytest.raises(PrecisionError, match=f"http://e serves another precision than the run asks for .*{words}"):
        check_server_precision("http://e", info, ASKED)


def test_a_run_without_quantized_weights_refuses_an_engine_that_has_them() -> None:
    with pytest.raises(PrecisionError, match="quantization fp8_blockwise instead of None"):
        check_server_precision(
            "http://e", embedded("bf16", EngineQuantization("fp8_blockwise")), PrecisionConfig(rollout="bf16")
        )


@pytest.mark.parametrize("rollout", ["fp8_blockwise", "int8"])
def test_weight_only_quantization_is_not_asked_of_sglang(rollout: str) -> None:
    with pytest.raises(PrecisionError, match="http://e is an SGLang server, which always quantizes the inputs"):
        check_server_precision(
            "http://e", {"dtype": "bfloat16", "quantization": "fp8"}, PrecisionConfig(rollout=rollout)
        )


def test_an_sglang_server_on_cpu_is_taken_for_values_and_one_on_a_gpu_for_codes() -> None:
    values, cpu, gpu = (
        PrecisionConfig(rollout="fp8_blockwise"),
        {"device": "cpu"},
        {"device": "cuda", "quantization": "fp8"},
    )
    served = {"dtype": "bfloat16", "quantization": None}
    check_server_precision("http://e", served | cpu, values, dequantized=True)
    check_server_precision("http://e", served | gpu, ASKED)
    with pytest.raises(
        PrecisionError, match=r"http://e is an SGLang server on CPU, .*would send it codes: set rollout.engine: sgl"
    ):
        check_server_precision("http://e", served | cpu, ASKED)
    with pytest.raises(PrecisionError, match=r"http://e is an SGLang server on a GPU, .*would send it values"):
        check_server_precision("http://e", served | gpu, values, dequantized=True)
    with pytest.raises(PrecisionError, match="http://e is an embedded server, which takes codes itself"):
        check_server_precision("http://e", embedded("bf16", EngineQuantization.of(values)), values, dequantized=True)
    with pytest.raises(PrecisionError, match="dtype float32 instead of bfloat16"):
        check_server_precision("http://e", served | cpu | {"dtype": "float32"}, values, dequantized=True)
