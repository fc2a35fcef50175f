"""Publishing: one weight version on every engine, retried with the engines that are left."""

from megatron_rl.errors import EngineError
from megatron_rl.policy.actor import Policy
from megatron_rl.precision.plan import PrecisionPlan
from megatron_rl.weight_sync.sync import WeightSync


def publish_weights(policy: Policy, sync: WeightSync, precision: PrecisionPlan | None, version: int) -> None:
    """Put the policy's weights on every engine, verified. Collective.

    Lost engines that are healthy again take part. The update is retried with the surviving engines. It is retried once
    more if an engine holds a mix of both versions, which only a full update repairs.

    Args:
        policy: the trained model.
        sync: the weight sync; its pool is on rank 0.
        precision: decides how the weights are sent; None: they are sent in the dtypes of the source folder.
        version: number of the new version.

    Raises:
        EngineError: on every rank, if no engine is left or a retry cannot help.
        CheckpointError: if the weights are not finite or cannot be written.
    """
    mesh = policy.mesh
    mesh.on_lead(lambda: sync.forget(sync.engines.recover_lost()))
    repaired = False
    while True:
        before = mesh.on_lead(lambda: sync.engines.live_urls)
        try:
            sync.push(policy.export(precision), version)
            return
        except EngineError as error:
            left, quarantined = mesh.on_lead(lambda: (sync.engines.live_urls, sync.engines.quarantined))
            if not left:
                lost = mesh.on_lead(lambda: sync.engines.lost)
                reasons = "; ".join(f"{url}: {reason}" for url, reason in lost.items())
                mesh.raise_everywhere(EngineError(f"{error}; engines lost so far: {reasons}") if reasons else error)
            repairs = bool(quarantined) and not repaired
            if len(left) == len(before) and not repairs:
                raise
            repaired = repaired or len(left) == len(before)
            if mesh.rank == 0:
                print(f"weight update repeated with {len(left)} of {len(before)} engines: {error}", flush=True)
