"""What the `alp` section asks for, checked against the model and the objective before anything is allocated."""

from collections.abc import Mapping
from typing import Any

from megatron_rl.config import AlpConfig
from megatron_rl.errors import ConfigError
from megatron_rl.objectives import OBJECTIVES, Objective
from megatron_rl.objectives.ratio import RatioObjective
from megatron_rl.perturbation.layer import LayerNoise


def layer_noise(alp: AlpConfig, num_layers: int) -> LayerNoise | None:
    """How the layers of a model are perturbed, None when they are not. Raises ConfigError for layers it does not have."""
    if not alp.enabled:
        return None
    layers = None if alp.layers == "all" else alp.layers
    if layers is not None and layers[1] > num_layers:
        raise ConfigError(
            f"alp.layers is [{layers[0]}, {layers[1]}), but the model has layers 0 to {num_layers - 1}: end at {num_layers}"
        )
    return LayerNoise(alp.sigma_init, alp.learnable, layers)


def check_ratio(alp: AlpConfig, objective: Objective, key: str = "objective") -> Objective:
    """The objective. Raises ConfigError when perturbation is asked for and this one has no ratio to perturb."""
    if alp.enabled and not isinstance(objective, RatioObjective):
        with_ratio = ", ".join(sorted(name for name, kind in OBJECTIVES.items() if issubclass(kind, RatioObjective)))
        raise ConfigError(
            f"alp.enabled is true, but {key} {objective.name} uses no importance ratio: the perturbed policy is the numerator "
            f"of a ratio, and without one noise only blurs the gradient; set alp.enabled: false, or use one of {with_ratio}"
        )
    return objective


def with_level(alp: AlpConfig, spec: Mapping[str, Any]) -> dict[str, Any]:
    """The spec of an objective with the level that `alp.level` asks for. Raises ConfigError when it names another one."""
    if not alp.enabled or alp.level is None:
        return dict(spec)
    if spec.get("level", alp.level) != alp.level:
        raise ConfigError(
            f"objective.level is '{spec['level']}', but alp.level is '{alp.level}': give it in one of the two places"
        )
    kind = OBJECTIVES.get(str(spec.get("name")))
    if alp.level == "token" and (kind is None or not issubclass(kind, RatioObjective)):
        return dict(spec)
    return {**spec, "level": alp.level}
