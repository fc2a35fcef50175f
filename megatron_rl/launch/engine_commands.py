"""Commands of the roles of a job, from the configuration. The conductor fills in hosts and ports."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from megatron_rl.config import Config, SGLangConfig
from megatron_rl.engines.processes.sglang import server_environment, server_flags
from megatron_rl.errors import ConfigError
from megatron_rl.plan.algorithm_plan import plan_algorithm
from megatron_rl.plan.reference_check import check_reference
from megatron_rl.precision.plan import compute_dtype, resolve
from megatron_rl.protocol.server_options import EngineQuantization, ServerOptions
from megatron_rl.weights.families import read_family
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.hf_model import check_folder


def check_model(config: Config) -> None:
    """Check model and reference from their headers, before anything is submitted.

    Raises CheckpointError or ConfigError.
    """
    sizes = {"tensor_parallel": config.parallel.tensor, "expert_parallel": config.parallel.expert}
    check_reference(config, check_folder(HFFolder(config.model.path), **sizes))


def engine_command(config: Config, python: str, gpus: int, local: int, key: Path) -> list[str]:
    """Return the command of an engine, with @HOST@ and @PORT@ for its address.

    Args:
        config: the resolved configuration, with absolute paths.
        python: the interpreter with megatron-rl.
        gpus: GPUs of the node; 0: the engine computes on CPUs.
        local: number of the engine on its node.
        key: file with the key that requests must carry.

    Raises:
        ConfigError: the engine needs something that the launcher does not do.
    """
    device = "cuda" if gpus and config.run.device != "cpu" else "cpu"
    if config.rollout.engine == "embedded":
        return _embedded_command(config, python, device, key)
    return _sglang_command(config, device, local, key)


def _embedded_command(config: Config, python: str, device: str, key: Path) -> list[str]:
    options = ServerOptions(
        config.model.path,
        host="@HOST@",
        port=0,
        dtype=compute_dtype(config.precision),
        deterministic=config.rollout.deterministic,
        device=device,
        api_key_file=key,
        quantization=EngineQuantization.of(config.precision),
    )
    arguments = list(options.arguments)
    arguments[arguments.index("--port") + 1] = "@PORT@"
    return [python, "-m", "megatron_rl", *arguments]


def _sglang_command(config: Config, device: str, local: int, key: Path) -> list[str]:
    rollout = config.rollout
    _, shape = read_family(HFFolder(config.model.path).config, str(config.model.path))
    plan = resolve(config.precision, shape.num_layers, engine="sglang", device=device)
    if rollout.sglang.router:
        raise ConfigError("rollout.sglang.router: the launcher starts no router; set it to false")
    if plan.rolls_out_low:
        raise ConfigError(
            f"precision.rollout: {config.precision.rollout} with SGLang needs a folder that the trainer writes before "
            "the servers start, which the launcher does not do yet: take rollout.engine: embedded or another format"
        )
    flags = server_flags(
        plan,
        rollout.sglang,
        device=device,
        routing=rollout.routing_replay,
        keeps_cache=rollout.update_mode == "in_place",
        offloads=plan_algorithm(config).offloads_engines,
    )
    words = [str(rollout.sglang.python), "-m", "sglang.launch_server", "--model-path", str(config.model.path), *flags]
    words += ["--host", "@HOST@", "--port", "@PORT@", "--weight-version", "default"]
    words += ["--config", str(sglang_key_file(key))]  # a key on the command line could be read by all users
    if device == "cuda":
        words += ["--base-gpu-id", str((rollout.sglang.first_gpu or 0) + local * rollout.sglang.tensor)]
    return words


def sglang_key_file(key: Path) -> Path:
    """Return the file of options that gives SGLang the key of a file."""
    return key.with_name(f"{key.name}.yaml")


def engine_environment(config: Config, gpus: int) -> dict[str, str]:
    """Return the variables that an engine needs."""
    if config.rollout.engine == "embedded":
        return {}
    return server_environment("cuda" if gpus and config.run.device != "cpu" else "cpu")


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration with every path absolute: a job runs in another folder.

    Keys of SGLang stay as they are with another engine, where they may not be set.
    """

    def absolute(block: Any) -> Any:
        changed = {}
        for name in type(block).model_fields:
            value = getattr(block, name)
            if isinstance(value, SGLangConfig) and config.rollout.engine != "sglang":
                continue
            if isinstance(value, BaseModel):
                changed[name] = absolute(value)
            elif isinstance(value, Path):
                changed[name] = value.absolute()
        return block.model_copy(update=changed)

    made: Config = absolute(config)
    return made
