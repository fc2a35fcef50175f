"""The servers that a configuration asks us to start."""

from megatron_rl.config import Config
from megatron_rl.precision.plan import PrecisionPlan, compute_dtype
from megatron_rl.rollout.lifecycle import EmbeddedServers
from megatron_rl.rollout.processes import Servers
from megatron_rl.rollout.quantised import Quantisation
from megatron_rl.rollout.sglang import SGLangServers, server_flags


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
            quantisation=Quantisation.of(config.precision),
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
        ),
        rollout.sglang,
        count=rollout.servers,
        device=device,
        start_timeout_s=start_timeout_s,
        quantised=plan if plan.rolls_out_low else None,
    )
