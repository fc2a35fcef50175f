"""Options of an embedded server are checked on the command line, and a started server gets all of them."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_rl import cli
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.protocol.server_options import EngineQuantization, ServerOptions, parse_quantization
from megatron_rl.server import app


def test_words_that_mean_nothing_are_refused() -> None:
    assert parse_quantization("none", "none", False, "bf16") is None
    with pytest.raises(UserError, match=r"--quantization 'fp4' is not one of \['none', "):
        parse_quantization("fp4", "none", False, "bf16")
    with pytest.raises(UserError, match="--activations 'int8' is not one of"):
        parse_quantization("int8", "int8", False, "bf16")
    with pytest.raises(UserError, match="--activations fp8 needs quantized weights"):
        parse_quantization("none", "fp8", False, "bf16")
    with pytest.raises(UserError, match="--first-last-bf16 spares layers of quantized weights"):
        parse_quantization("none", "none", True, "bf16")
    with pytest.raises(ConfigError, match="rollout_activations: fp8 needs such weights"):
        EngineQuantization("int8", "fp8").plan(3, "bf16")


def test_the_arguments_of_a_server_are_read_back_as_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ServerOptions(
        Path("/model"),
        host="0.0.0.0",
        port=1,
        dtype="bf16",
        threads=2,
        deterministic=True,
        weight_version="7",
        device="cuda",
        max_rows=3,
        parent_pid=4,
        quantization=EngineQuantization("fp8_blockwise", "fp8", True, "fp32"),
        api_key_file=Path("/key"),
        ready_file=Path("/ready.json"),
        save_dirs=(Path("/a"), Path("/b c")),
    )
    started: list[ServerOptions] = []
    monkeypatch.setattr(app, "run_server", started.append)
    for given in (options, ServerOptions(Path("/model"))):
        result = CliRunner().invoke(cli.app, list(given.arguments))
        assert result.exit_code == 0, result.output
    assert started == [options, ServerOptions(Path("/model"))]


@pytest.mark.parametrize(
    ("name", "number"), [("port", 80_000), ("port", -1), ("threads", -1), ("threads", 10**6), ("max_rows", 0)]
)
def test_a_number_outside_its_range_is_refused_naming_the_option(name: str, number: int) -> None:
    with pytest.raises(UserError, match=rf"--{name.replace('_', '-')} {number} is outside"):
        ServerOptions(Path("model"), **{name: number})
