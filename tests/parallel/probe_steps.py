"""Function that the ranks of a group run to score the probe, the text that identifies an engine's weights."""

from pathlib import Path
from typing import Any

from megatron_rl.weight_sync.confirmation import ScoreProbe
from megatron_rl.weight_sync.make_sync import score_probe
from tests.parallel.steps import make_config_of, make_policy
from tests.policies import embedded_plan


def probe(model: Path, layout: dict[str, Any], **sections: Any) -> tuple[ScoreProbe, set[float]]:
    """Return the probe, and the temperatures at which the policy trains after it.

    The arguments are described in `tests.parallel.steps`.
    """
    config = make_config_of(model, layout, **sections)
    policy = make_policy(model, layout, **sections)
    plan = embedded_plan(config.precision, policy.shape.num_layers)
    return score_probe(config, policy, plan), {chunk.temperature for chunk in policy.models}
