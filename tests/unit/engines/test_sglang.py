"""SGLang servers start with the configured options, report why they cannot start, and end with the trainer."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.config import PrecisionConfig, SGLangConfig, make_config
from megatron_rl.engines.processes import subreaper as guard
from megatron_rl.engines.processes.embedded import EmbeddedServers
from megatron_rl.engines.processes.own_servers import own_servers
from megatron_rl.engines.processes.sglang import (
    SGLangServers,
    inherited_environment,
    server_environment,
    server_flags,
    write_as_sent,
)
from megatron_rl.engines.requirements import check_server
from megatron_rl.errors import ConfigError, EngineError, PrecisionError
from megatron_rl.precision.formats import fake_quantize
from megatron_rl.precision.plan import PrecisionPlan, resolve
from megatron_rl.weights.hf_folder import HFFolder
from tests.policies import embedded_plan


def plan(device: str = "cpu", **precision: object) -> PrecisionPlan:
    return resolve(PrecisionConfig(**precision), 3, engine="sglang", device=device)


def flags(
    device: str,
    settings: SGLangConfig = SGLangConfig(),  # noqa: B008
    *,
    routing: bool = False,
    **precision: object,
) -> str:
    return " ".join(server_flags(plan(device, **precision), settings, device=device, routing=routing))


# --- options from the configuration


def test_on_cpu_the_server_gets_the_recipe_and_the_dtype_of_the_plan():
    said = flags("cpu")
    assert "--dtype float32" in said and "--device cpu --attention-backend torch_native" in said
    assert "--quantization" not in said and "--enable-return-routed-experts" not in said
    assert "--dtype bfloat16" in flags("cpu", rollout="bf16")


def test_fp8_on_cpu_is_emulated_by_the_weights_sent_and_no_flag_asks_for_it():
    assert plan("cpu", rollout="fp8_blockwise").dequantized
    assert "--quantization" not in flags("cpu", rollout="fp8_blockwise")


def test_on_a_gpu_flags_are_those_of_the_plan():
    settings = SGLangConfig(tensor=2, mem_fraction=0.5)
    said = flags("cuda", settings, rollout="fp8_blockwise", rollout_activations="fp8")
    assert "--dtype bfloat16 --quantization fp8 --tp 2 --mem-fraction-static 0.5 --kv-cache-dtype auto" in said
    assert "--device" not in said and "torch_native" not in said
    assert not plan("cuda", rollout="fp8_blockwise", rollout_activations="fp8").dequantized


def test_routed_experts_are_asked_for_and_further_arguments_come_last():
    said = flags("cpu", SGLangConfig(args=("--max-running-requests", "4")), routing=True)
    assert said.endswith("--enable-return-routed-experts --max-running-requests 4")


def test_servers_that_rest_are_told_so_on_a_gpu_where_they_would_keep_their_memory():
    resting = {
        device: server_flags(plan(device), SGLangConfig(), device=device, offloads=True) for device in ("cpu", "cuda")
    }
    assert "--enable-memory-saver" in resting["cuda"] and "--enable-memory-saver" not in resting["cpu"]
    assert "--enable-memory-saver" not in flags("cuda")


def test_servers_take_the_gpus_from_the_first_one_on_in_order():
    two = SGLangServers("model", "logs", [], SGLangConfig(tensor=2), count=2, device="cuda", first_gpu=4)
    assert [" ".join(two.command(i, 1)[-2:]) for i in range(2)] == ["--base-gpu-id 4", "--base-gpu-id 6"]


ERPD = {"name": "erpd", "teacher": {"name": "sapo", "ratio_denominator": "trainer_old"}, "teacher_updates": 2}


@pytest.mark.parametrize(
    ("section", "info", "words"),
    [
        (
            {"rollout": {"engine": "sglang"}},
            {"engine": "embedded"},
            "rollout.engine is sglang, and http://a is embedded",
        ),
        ({}, {"device": "cuda"}, "rollout.engine is embedded, and http://a is sglang"),
        ({"rollout": {"deterministic": True}}, {"engine": "embedded"}, "deterministic is true, and http://a is not"),
        (
            {"rollout": {"engine": "sglang", "update_mode": "in_place", "max_staleness": 1}},
            {"device": "cpu", "disable_radix_cache": False},
            "http://a, and later prompts would begin with them: start it with --disable-radix-cache",
        ),
        (
            {"rollout": {"engine": "sglang"}, "objective": ERPD},
            {"device": "cuda", "enable_memory_saver": False},
            "http://a would keep it: start it with --enable-memory-saver",
        ),
    ],
)
def test_a_running_server_that_would_do_otherwise_than_asked_is_refused(
    section: dict[str, object], info: dict[str, object], words: str
):
    config = make_config({"model": {"path": "nowhere"}, **section})
    with pytest.raises(ConfigError, match=words):
        check_server("http://a", info, config, offloads="objective" in section)


@pytest.mark.parametrize(
    ("argument", "key"),
    [("--dtype=half", "precision.rollout"), ("--tp", "rollout.sglang.tensor"), ("--port", "rollout.urls")],
)
def test_an_argument_that_another_key_decides_is_refused_by_that_key(argument: str, key: str):
    with pytest.raises(ConfigError, match=f"rollout.sglang.args holds {argument}, which {key} decides"):
        flags("cpu", SGLangConfig(args=(argument, "2")))


@pytest.mark.parametrize(
    ("device", "precision", "words"),
    [
        ("cpu", {"rollout": "int8"}, "int8 is weights alone"),
        ("cuda", {"rollout": "int8"}, "int8 is weights alone"),
        ("cpu", {"rollout": "fp8_blockwise", "rollout_activations": "fp8"}, "no low-precision products"),
        ("cuda", {"rollout": "fp8_blockwise"}, "always quantizes"),
    ],
)
def test_what_sglang_would_do_otherwise_than_asked_is_refused(device: str, precision: dict[str, str], words: str):
    with pytest.raises(PrecisionError, match=words):
        plan(device, **precision)
    embedded_plan(PrecisionConfig(**precision), 3)  # the embedded engine supports all of them


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        ({"sglang": {"router": True}}, "needs engine: sglang"),
        ({"engine": "sglang", "sglang": {"router": True}, "urls": ["http://a"]}, "urls or urls_dir names others"),
        ({"engine": "sglang", "sglang": {"router": True}, "routing_replay": True}, "drops the request for experts"),
        ({"engine": "sglang", "deterministic": True}, "a promise of engine: embedded"),
    ],
)
def test_a_rollout_section_that_contradicts_its_engine_is_refused(rollout: dict[str, object], words: str):
    with pytest.raises(ConfigError, match=words):
        make_config({"model": {"path": "nowhere"}, "rollout": rollout})


def test_the_engine_of_the_configuration_decides_which_servers_are_started():
    for engine, kind in (("embedded", EmbeddedServers), ("sglang", SGLangServers)):
        config = make_config({"model": {"path": "nowhere"}, "rollout": {"engine": engine, "servers": 3}})
        servers = own_servers(config, resolve(config.precision, 3, engine=engine, device="cpu"), "cpu", 5.0)
        assert type(servers) is kind and servers.count == 3 and servers.urls == ()


def test_the_stand_ins_for_cpu_reach_no_server_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", "/of/the/user")
    monkeypatch.setenv("RANK", "0")
    cpu, gpu = (SGLangServers(tmp_path, tmp_path, [], device=device).environment() for device in ("cpu", "cuda"))
    assert gpu["PYTHONPATH"] == "/of/the/user" and "SGLANG_USE_CPU_ENGINE" not in gpu
    shim, theirs = cpu["PYTHONPATH"].split(os.pathsep)
    assert theirs == "/of/the/user" and (Path(shim) / "sitecustomize.py").is_file()
    assert "RANK" not in cpu and shim not in sys.path


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_engines_start_from_the_weights_the_trainer_would_send(qwen3: Path, tmp_path: Path, device: str):
    precision = {"train": "bf16", "rollout": "fp8_blockwise"} | (
        {"rollout_activations": "fp8"} if device == "cuda" else {}
    )
    chosen = plan(device, **precision)
    write_as_sent(qwen3, chosen, tmp_path / "start")
    written = load_file(tmp_path / "start" / "model.safetensors")
    name, plain = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    trained = HFFolder(qwen3).read(name).bfloat16()
    stated = HFFolder(tmp_path / "start").config.get("quantization_config")
    if device == "cpu":
        assert stated is None
        assert torch.equal(written[name], fake_quantize(trained, chosen.wire, torch.bfloat16))
        assert name + "_scale_inv" not in written
    else:
        assert written[name].dtype == torch.float8_e4m3fn and name + "_scale_inv" in written
        assert stated["weight_block_size"] == [128, 128]
    assert torch.equal(written[plain], HFFolder(qwen3).read(plain).bfloat16())


# --- errors at the start


@pytest.fixture
def servers(tmp_path: Path) -> Callable[..., SGLangServers]:
    """Return a function that makes servers whose interpreter is a shell script with the given text."""

    def make(script: str, count: int = 1, timeout_s: float = 20.0) -> SGLangServers:
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        return SGLangServers(
            "model", tmp_path / "logs", [], SGLangConfig(python=python), count, start_timeout_s=timeout_s
        )

    return make


def test_a_missing_interpreter_is_named_with_the_mend(tmp_path: Path):
    settings = SGLangConfig(python=tmp_path / "no" / "python")
    with pytest.raises(
        EngineError, match=r"rollout\.sglang\.python: no interpreter at /.*/no/python: run `make sglang`"
    ):
        SGLangServers("model", tmp_path, [], settings).start()


def test_a_server_that_dies_at_its_start_is_quoted_and_the_other_one_ended(servers: Callable[..., SGLangServers]):
    both = servers('echo "no such model: $4" >&2; exit 3', count=2)
    with pytest.raises(EngineError, match=r"(?s)SGLang server 0 ended with code 3.*server-0\.log ends:.*no such model"):
        both.start()
    assert both.urls == ()


def test_a_port_that_stays_taken_is_said_after_other_ports_were_tried(servers: Callable[..., SGLangServers]):
    taken = servers('echo "[Errno 98] error while attempting to bind on address: address already in use"; exit 1')
    with pytest.raises(EngineError, match="address already in use"):
        taken.start()
    assert (taken.log_dir / "server-0.log").read_text().count("already in use") == 3


def test_a_server_that_never_answers_is_given_up_after_the_time_and_ended(servers: Callable[..., SGLangServers]):
    silent = servers("echo loading; exec sleep 60", timeout_s=1.0)
    silent.launch()
    (pid,) = silent.pids
    with pytest.raises(EngineError, match=r"(?s)SGLang server 0 was not healthy within 1 s.*loading"):
        silent.wait_healthy()
    assert not psutil.pid_exists(pid)


# --- the guard


Start = Callable[[list[str]], tuple[subprocess.Popen[str], psutil.Process]]
PARENT = """
import os, subprocess, sys, time
guard = subprocess.Popen([sys.executable, "-I", sys.argv[1], str(os.getpid()), *sys.argv[2:]], start_new_session=True)
print(guard.pid, flush=True)
time.sleep(60)
"""
FAMILY = ["sh", "-c", "trap '' TERM; (setsid sleep 61 & sleep 62) & sleep 63; true"]  # one of them leaves the session


def gone(processes: list[psutil.Process], within_s: float = 10.0) -> bool:
    return not psutil.wait_procs(processes, timeout=within_s)[1]


def family_of(guarding: psutil.Process, seconds: set[str]) -> list[psutil.Process]:
    """Return the guard's descendants, once a `sleep` of each of the given seconds is among them."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        found = guarding.children(recursive=True)
        if seconds <= {process.cmdline()[-1] for process in found if process.cmdline()[:1] == ["sleep"]}:
            return found
        time.sleep(0.05)
    pytest.fail("the command did not start its processes")


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts a parent process and its guard, which runs the command. It returns both."""
    parents = []

    def start(command: list[str]) -> tuple[subprocess.Popen[str], psutil.Process]:
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, guard.__file__, *command], stdout=subprocess.PIPE, text=True
        )
        parents.append(parent)
        assert parent.stdout is not None
        return parent, psutil.Process(int(parent.stdout.readline()))

    yield start
    for parent in parents:
        parent.kill()
        parent.wait()


def test_nothing_of_a_server_outlives_the_trainer_that_was_killed(start: Start):
    parent, guarding = start(FAMILY)
    family = family_of(guarding, {"61", "62", "63"})
    parent.kill()
    parent.wait()
    assert gone([guarding, *family])


def test_nothing_of_a_server_outlives_a_stop(start: Start):
    _, guarding = start(FAMILY)
    family = family_of(guarding, {"61", "62", "63"})
    guarding.terminate()
    assert gone(family)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone has a death signal")
def test_the_server_dies_with_its_guard(start: Start):
    _, guarding = start(["sleep", "64"])
    family = family_of(guarding, {"64"})
    guarding.kill()
    assert gone(family)


@pytest.mark.parametrize(("command", "code"), [(["sh", "-c", "exit 7"], 7), (["sh", "-c", "kill -9 $$"], 137)])
def test_the_guard_ends_with_the_code_of_its_command(command: list[str], code: int):
    done = subprocess.run([sys.executable, "-I", guard.__file__, str(os.getpid()), *command], check=False, timeout=20)
    assert done.returncode == code


def test_a_server_on_a_gpu_inherits_no_settings_of_the_trainer(monkeypatch: pytest.MonkeyPatch):
    for name in ("OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "NVTE_FLASH_ATTN", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "1")
    inherited = inherited_environment("cuda")
    assert "NCCL_SOCKET_IFNAME" in inherited and not inherited.keys() & {
        "OMP_NUM_THREADS",
        "PYTORCH_CUDA_ALLOC_CONF",
        "NVTE_FLASH_ATTN",
    }
    assert server_environment("cuda")["SGLANG_JIT_DEEPGEMM_PRECOMPILE"] == "0"
    assert "SGLANG_JIT_DEEPGEMM_PRECOMPILE" not in server_environment("cpu")
