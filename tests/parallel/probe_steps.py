"""What the ranks of a group run to score the text by which an engine's weights are known."""

from pathlib import Path
from typing import Any

from megatron_rl.precision.plan import resolve
from megatron_rl.weight_sync.make_sync import score_probe
from megatron_rl.weight_sync.transaction import Probe
from tests.parallel.steps import make_policy


def probe(model: Path, layout: dict[str, Any], **sections: Any) -> tuple[Probe, set[float]]:
    """The probe, and the temperatures at which the policy trains afterwards."""
    policy = make_policy(model, layout, **sections)
    plan = resolve(policy.config.precision, policy.shape.num_layers)
    return score_probe(policy.config, policy, plan), {chunk.temperature for chunk in policy.models}
