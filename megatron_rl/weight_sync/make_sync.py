"""Builds the weight sync from the configuration."""

import numpy as np

from megatron_rl.config import Config
from megatron_rl.engines.pool import EnginePool
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.parallel import Mesh
from megatron_rl.policy.temperature import at_temperature_one
from megatron_rl.precision.plan import PrecisionPlan
from megatron_rl.types import Batch
from megatron_rl.weight_sync.confirmation import ScoreProbe
from megatron_rl.weight_sync.sync import WeightSync
from megatron_rl.weight_sync.transports.disk import DiskTransport
from megatron_rl.weight_sync.transports.distributed import DistributedTransport
from megatron_rl.weight_sync.transports.tensor import TensorTransport
from megatron_rl.weight_sync.transports.transport import Transport
from megatron_rl.weights.quantized import quantization_config

_PROBE_TOKENS = 64
# Allowed mean difference of log-probabilities between an engine and the trainer with the same weights, in nats.
# Measured with SGLang on CPU: 3e-6 in fp32 and 6e-3 in bf16.
_TOLERANCE = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.05}
_LOW_TOLERANCE = 0.3  # for quantized weights or inputs


def make_sync(
    config: Config, policy: Policy, mesh: Mesh, precision: PrecisionPlan, pool: EnginePool | None
) -> WeightSync:
    """Return the weight sync of a run.

    Args:
        config: the resolved configuration.
        policy: the trained model.
        mesh: the parallel layout.
        precision: the precision plan.
        pool: the engines on rank 0, None on the other ranks. All other arguments are the same on every rank.
    """
    return WeightSync(
        pool,
        policy.source,
        make_transport(config, policy, mesh, precision),
        mode=config.rollout.update_mode,
        group=mesh.control,
        probe=lambda: score_probe(config, policy, precision),
    )


def make_transport(config: Config, policy: Policy, mesh: Mesh, precision: PrecisionPlan) -> Transport:
    """Return the transport of `rollout.transport`.

    Args:
        config: the resolved configuration.
        policy: the trained model.
        mesh: the parallel layout.
        precision: the precision plan.
    """
    rollout = config.rollout
    if rollout.transport == "distributed":
        return DistributedTransport(rollout.bucket_mb << 20, rollout.timeout_s, mesh.device)
    if rollout.transport == "tensor":
        return TensorTransport(rollout.bucket_mb << 20)
    # A folder without codes has no quantization config.
    quantization = None if precision.dequantized else quantization_config(precision, policy.source.tensors)
    staging = None if rollout.weights_dir is None else rollout.weights_dir / config.run.name
    return DiskTransport(policy.source, staging, quantization=quantization)


def score_probe(config: Config, policy: Policy, precision: PrecisionPlan) -> ScoreProbe:
    """Return a fixed text scored under the policy's present weights. Collective.

    Args:
        config: the resolved configuration.
        policy: the trained model.
        precision: the precision plan, which decides the tolerance.
    """
    length = min(_PROBE_TOKENS, config.rollout.max_prompt_tokens + config.rollout.max_new_tokens)
    tokens = np.random.default_rng(0).integers(0, policy.shape.vocab_size, length).astype(np.int32)
    mask = np.ones(length, dtype=np.float32)
    mask[0] = 0
    nothing = np.zeros(1, dtype=np.float32)
    batch = Batch(
        ids=np.arange(1),
        groups=np.arange(1),
        tokens=tokens,
        cu_seqlens=np.array([0, length]),
        mask=mask,
        rewards=nothing,
        advantages=nothing,
        routing=_free_choice(policy, length) if config.rollout.routing_replay else None,
    )
    with at_temperature_one(policy):  # engines score a prompt at temperature 1
        logp = np.asarray(policy.mesh.broadcast(policy.logprobs(batch)))[1:length]
    low = precision.rolls_out_low or precision.trains_low
    tolerance = _LOW_TOLERANCE if low else max(_TOLERANCE[precision.engine], _TOLERANCE[precision.train])
    return ScoreProbe(tuple(tokens.tolist()), tuple(logp.tolist()), tolerance)


def _free_choice(policy: Policy, tokens: int) -> np.ndarray:
    """Return expert ids [tokens, L, K] int32, all -1: the router chooses every expert itself."""
    experts = policy.shape.experts
    return np.full((tokens, policy.shape.num_layers, experts.per_token if experts else 0), -1, dtype=np.int32)
