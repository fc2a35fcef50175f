"""SGLang's and sglang-router's own parsers take every argument that servers on CPUs and GPUs get.

No server starts, so arguments of GPUs are checked without one. What SGLang does with their values is not checked.
"""

import json
import subprocess
from pathlib import Path

import pytest

from megatron_rl.config import PrecisionConfig, SGLangConfig
from megatron_rl.engines.processes import sglang
from megatron_rl.precision.plan import resolve

PYTHON = Path(__file__).parents[3] / ".venv-sglang/bin/python"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-sglang here: `make sglang` makes it")
PARSE = """
import argparse, contextlib, io, json, sys
from sglang.srt.server_args import ServerArgs
from sglang_router.launch_router import parse_router_args
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
parsers = {"sglang.launch_server": parser.parse_args, "sglang_router.launch_router": parse_router_args}
parsed = {}
for name, module, arguments in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        parsed[name] = {key: repr(value) for key, value in vars(parsers[module](arguments)).items()}
    parsed.setdefault(name, said.getvalue())
print("\\n" + json.dumps(parsed))
"""
TWO = SGLangConfig(tensor=2)
FIRST_GPU = 4
FP8 = {"train": "bf16", "recipe": "blockwise", "rollout": "fp8_blockwise", "rollout_activations": "fp8"}
CASES = {
    "cpu": ("cpu", SGLangConfig(), {}, {}),
    "cpu_bf16_experts": ("cpu", SGLangConfig(), {"rollout": "bf16"}, {"routing": True, "keeps_cache": True}),
    "gpu": ("cuda", TWO, {"train": "bf16", "rollout": "bf16"}, {}),
    "gpu_fp8": ("cuda", TWO, FP8, {}),
    "gpu_all": ("cuda", TWO, FP8, {"routing": True, "keeps_cache": True, "offloads": True}),
    "unknown": ("cuda", SGLangConfig(args=("--no-such-argument",)), {}, {}),
}


def server_arguments(device, settings, precision, options):
    plan = resolve(PrecisionConfig(**precision), 3, engine="sglang", device=device)
    flags = sglang.server_flags(plan, settings, device=device, **options)
    return sglang.SGLangServers(
        "model", "logs", flags, settings, device=device, first_gpu=FIRST_GPU, keyed=True
    ).command(1, 30000)


def router_arguments():
    """Return the command line that `start_router` would start."""
    kept, sglang.ServerProcess = sglang.ServerProcess, lambda name, command, log, environment: command(30000)
    try:
        return sglang.start_router(["http://127.0.0.1:1"], Path("log"), SGLangConfig(), "cuda")
    finally:
        sglang.ServerProcess = kept


@pytest.fixture(scope="module")
def parsed():
    commands = {name: server_arguments(*case) for name, case in CASES.items()} | {"router": router_arguments()}
    split = [(name, line[line.index("-m") + 1], line[line.index("-m") + 2 :]) for name, line in commands.items()]
    run = subprocess.run(
        [PYTHON, "-c", PARSE, json.dumps(split)],
        check=False,
        env=sglang.environment_of_servers() | sglang.server_environment("cpu"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.strip().splitlines()[-1])


def test_every_argument_is_known(parsed):
    assert [(name, found) for name, found in parsed.items() if isinstance(found, str) and name != "unknown"] == []


def test_an_unknown_argument_is_found(parsed):
    assert "unrecognized arguments: --no-such-argument" in parsed["unknown"]


def test_values_arrive_where_they_are_meant(parsed):
    gpu, everything = parsed["gpu_fp8"], parsed["gpu_all"]
    assert (gpu["dtype"], gpu["quantization"]) == ("'bfloat16'", "'fp8'")
    assert (gpu["tp_size"], gpu["base_gpu_id"], gpu["mem_fraction_static"]) == ("2", "6", "0.8")
    assert gpu["enable_memory_saver"] == gpu["disable_radix_cache"] == "False"
    assert everything["enable_memory_saver"] == everything["disable_radix_cache"] == "True"
    assert everything["enable_return_routed_experts"] == parsed["cpu_bf16_experts"]["enable_return_routed_experts"]
    assert parsed["cpu"]["device"] == "'cpu'" and parsed["gpu"]["quantization"] == "None"
    assert parsed["router"]["disable_retries"] == "True" and "http://127.0.0.1:1" in parsed["router"]["worker_urls"]
