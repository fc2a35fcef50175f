"""Checks of what a server reports, before the trainer uses it. A server started by hand may have other options."""

from collections.abc import Mapping
from typing import Any

from megatron_rl.config import Config, PrecisionConfig
from megatron_rl.errors import ConfigError, PrecisionError
from megatron_rl.precision.plan import DTYPES, compute_dtype
from megatron_rl.protocol.server_options import EngineQuantization, describe_precision


def check_server_precision(
    url: str, info: Mapping[str, Any], precision: PrecisionConfig, *, dequantized: bool = False
) -> None:
    """Check that a server reports the precision that the run requires.

    Args:
        url: of the server.
        info: what it reports of itself, from `EnginePool.info`; embedded server or SGLang.
        precision: the section `precision` of the configuration.
        dequantized: as in the run's precision plan.

    Raises:
        PrecisionError: naming the URL, if the server has another precision.
    """
    engine_quantization = EngineQuantization.of(precision)
    dtype = compute_dtype(precision)
    if info.get("engine") == "embedded":
        if dequantized:
            raise PrecisionError(f"{url} is an embedded server, which takes codes itself: set rollout.engine: embedded")
        wanted = describe_precision(dtype, engine_quantization)
        flags = ["--dtype", dtype, *(engine_quantization.flags if engine_quantization else [])]
    else:
        on_cpu = info.get("device") == "cpu"
        if engine_quantization and on_cpu != dequantized:
            here, other = ("on CPU, which takes no FP8", "sglang") if on_cpu else ("on a GPU", "embedded")
            raise PrecisionError(
                f"{url} is an SGLang server {here}, and the run would send it {'values' if dequantized else 'codes'}: "
                f"set rollout.engine: {other} and run.device: {'cpu' if on_cpu else 'cuda'}, or name servers of the "
                "trainer's kind"
            )
        if (
            engine_quantization
            and not dequantized
            and (not engine_quantization.quantization.startswith("fp8") or engine_quantization.activations == "none")
        ):
            raise PrecisionError(
                f"{url} is an SGLang server, which always quantizes the inputs of quantized layers: set "
                "precision.rollout: fp8_blockwise and precision.rollout_activations: fp8, or use the embedded engine"
            )
        coded = engine_quantization is not None and not dequantized
        wanted = {"dtype": str(DTYPES[dtype]).removeprefix("torch."), "quantization": "fp8" if coded else None}
        flags = ["--dtype", str(wanted["dtype"]), *(["--quantization", "fp8"] if coded else [])]
    wrong = [f"{key} {info.get(key)} instead of {value}" for key, value in wanted.items() if info.get(key) != value]
    if wrong:
        raise PrecisionError(
            f"{url} serves another precision than the run asks for ({', '.join(wrong)}): start it with "
            f"{' '.join(flags)}, or change the precision section"
        )


def check_server(
    url: str, info: Mapping[str, Any], config: Config, *, updates: bool = True, offloads: bool = False
) -> None:
    """Check that a running server does what the configuration requires.

    Args:
        url: of the server.
        info: what it reports of itself, from `EnginePool.info`.
        config: the resolved configuration.
        updates: the server takes weight updates.
        offloads: the server must be able to release its memory.

    Raises:
        ConfigError: if the server would silently do something else.
    """
    rollout, embedded = config.rollout, info.get("engine") == "embedded"
    if embedded != (rollout.engine == "embedded"):
        found = "embedded" if embedded else "sglang"
        raise ConfigError(
            f"rollout.engine is {rollout.engine}, and {url} is {found}: set rollout.engine={found}, or name another "
            "server"
        )
    if rollout.deterministic and not info.get("deterministic"):
        raise ConfigError(f"rollout.deterministic is true, and {url} is not: start it with `serve --deterministic`")
    if embedded or not updates:
        return
    if rollout.update_mode == "in_place" and not info.get("disable_radix_cache"):
        raise ConfigError(
            f"rollout.update_mode: in_place leaves keys of older weights in the prefix cache of {url}, and later "
            "prompts would begin with them: start it with --disable-radix-cache, or take retract or abort"
        )
    if offloads and info.get("device") != "cpu" and not info.get("enable_memory_saver"):
        raise ConfigError(
            f"{'rollout.colocate: true' if rollout.colocate else f'objective.name: {config.objective.name}'} has "
            f"engines give their memory back, and {url} would keep it: "
            "start it with --enable-memory-saver"
        )
