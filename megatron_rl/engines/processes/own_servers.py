"""The servers that this run starts, from the configuration."""

from megatron_rl.config import Config
from megatron_rl.engines.processes.embedded import EmbeddedServers
from megatron_rl.engines.processes.server_process import Servers
from megatron_rl.engines.processes.sglang import SGLangServers, server_flags
from megatron_rl.precision.plan import PrecisionPlan, compute_dtype
from megatron_rl.protocol.server_options import EngineQuantization


def own_servers(
    config: Config,
    plan: PrecisionPlan,
    device: str,
    start_timeout_s: float,
    *,
    offloads: bool = False,
    first_gpu: int = 0,
) -> Servers:
    """Return the run's own servers, not started yet.

    Args:
        config: the resolved configuration.
        plan: the precision plan, resolved for these engines.
        device: cpu or cuda; embedded servers are always on the CPU.
        start_timeout_s: seconds until a server must be healthy.
        offloads: the servers must be able to release their memory.
        first_gpu: number of the first GPU of the first server.
    """
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
            keyed=True,
            save_dirs=(config.run.folder / "attribution",),
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
            offloads=offloads,
        ),
        rollout.sglang,
        count=rollout.servers,
        device=device,
        start_timeout_s=start_timeout_s,
        quantized=plan if plan.rolls_out_low else None,
        first_gpu=first_gpu,
        broadcasts=rollout.transport == "distributed",
        keyed=True,
    )
