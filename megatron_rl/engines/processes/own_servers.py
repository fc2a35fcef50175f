"""The servers that a configuration asks us to start, and what those that it names must be."""

from collections.abc import Mapping
from typing import Any

from megatron_rl.config import Config
from megatron_rl.engines.processes.embedded import EmbeddedServers
from megatron_rl.engines.processes.server_process import Servers
from megatron_rl.engines.processes.sglang import SGLangServers, server_flags
from megatron_rl.errors import ConfigError
from megatron_rl.precision.plan import PrecisionPlan, compute_dtype
from megatron_rl.server.quantized_linear import EngineQuantization


def own_servers(config: Config, plan: PrecisionPlan, device: str, start_timeout_s: float) -> Servers:
    """Not started yet. plan: resolved for these engines. device: `cpu` or `cuda`; embedded servers are always on CPU."""
    rollout, logs = config.rollout, config.run.folder / "servers"
    if rollout.engine == "embedded":
        return EmbeddedServers(
            config.model.path,
            logs,
            count=rollout.servers,
            dtype=compute_dtype(config.precision),
            deterministic=rollout.deterministic,
            start_timeout_s=start_timeout_s,
            engine_quantization=EngineQuantization.of(config.precision),
        )
    return SGLangServers(
        config.model.path,
        logs,
        server_flags(
            plan,
            rollout.sglang,
            device=device,
            routing=rollout.routing_replay,
            keeps_cache=rollout.update_mode == "in_place",
            rests=_rests(config),
        ),
        rollout.sglang,
        count=rollout.servers,
        device=device,
        start_timeout_s=start_timeout_s,
        quantized=plan if plan.rolls_out_low else None,
    )


def check_named(url: str, info: Mapping[str, Any], config: Config, *, updates: bool = True) -> None:
    """Raises ConfigError for a running server that would silently do otherwise than asked. info: what it says of itself.
    updates: it is to take other weights than it has.
    """
    rollout, embedded = config.rollout, info.get("engine") == "embedded"
    if embedded != (rollout.engine == "embedded"):
        found = "embedded" if embedded else "sglang"
        raise ConfigError(
            f"rollout.engine is {rollout.engine}, and {url} is {found}: set rollout.engine={found}, or name another server"
        )
    if rollout.deterministic and not info.get("deterministic"):
        raise ConfigError(f"rollout.deterministic is true, and {url} is not: start it with `serve --deterministic`")
    if embedded or not updates:
        return
    if rollout.update_mode == "in_place" and not info.get("disable_radix_cache"):
        raise ConfigError(
            f"rollout.update_mode: in_place leaves keys of older weights in the prefix cache of {url}, and later prompts would "
            "begin with them: start it with --disable-radix-cache, or take retract or abort"
        )
    if _rests(config) and info.get("device") != "cpu" and not info.get("enable_memory_saver"):
        raise ConfigError(
            f"objective.name: erpd has engines give their memory back, and {url} would keep it: start it with "
            "--enable-memory-saver"
        )


def _rests(config: Config) -> bool:
    """Whether engines give their memory back while the trainer learns."""
    return config.objective.name == "erpd"
