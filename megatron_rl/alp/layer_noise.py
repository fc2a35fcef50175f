"""Settings of the `alp` section, checked against the model and the objective before anything is allocated."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megatron_rl.config import AlpConfig
from megatron_rl.errors import ConfigError
from megatron_rl.objectives import OBJECTIVES, Objective, make_objective, objective_class
from megatron_rl.objectives.grpo import PPO
from megatron_rl.objectives.ratio import RatioObjective

# The clips of arXiv 2603.19470. They apply to objectives that clip as PPO does, if the objective sets no clip itself.
CLIPS = MappingProxyType(
    {
        "token": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0},
        "sequence": {"clip_low": 0.5, "clip_high": 3.0, "dual_clip": 3.0},
    }
)


@dataclass(frozen=True)
class LayerNoise:
    """Settings of the noise of a model.

    Attributes:
        sigma_init: initial standard deviation of the noise.
        learnable: True if sigma is a parameter.
        layers: [start, end) of the global layers, None for all.
        logits: True to perturb the logits and no layer.
    """

    sigma_init: float
    learnable: bool = True
    layers: tuple[int, int] | None = None
    logits: bool = False

    def perturbs(self, layer: int) -> bool:
        """Return whether the outputs of a layer are perturbed. `layer` is the global layer number."""
        return not self.logits and (self.layers is None or self.layers[0] <= layer < self.layers[1])


def layer_noise(alp: AlpConfig, num_layers: int) -> LayerNoise | None:
    """Return how a model is perturbed, None if it is not. Raise ConfigError for layers that the model does not have."""
    if not alp.enabled:
        return None
    if alp.layers == "logits":
        return LayerNoise(alp.sigma_init, alp.learnable, logits=True)
    layers = None if alp.layers == "all" else alp.layers
    if layers is not None and layers[1] > num_layers:
        raise ConfigError(
            f"alp.layers is [{layers[0]}, {layers[1]}), but the model has layers 0 to {num_layers - 1}: "
            f"end at {num_layers}"
        )
    return LayerNoise(alp.sigma_init, alp.learnable, layers)


def alp_objective(alp: AlpConfig, spec: Mapping[str, Any]) -> Objective:
    """Return the objective of `spec` with the level `alp.level`. If `spec` sets no clip, use the clips of that level.

    Raises:
        ConfigError: the objective is illegal, has no ratio, or sets another level itself.
    """
    if alp.enabled:
        kind = objective_class(spec.get("name"))
        check_ratio(alp, kind)
        if alp.level is not None:
            spec = _leveled(alp.level, kind, spec)
    return make_objective(spec)


def check_ratio(alp: AlpConfig, kind: type[Objective], key: str = "objective") -> None:
    """Raise ConfigError if perturbation is enabled and the objective has no ratio to perturb.

    Args:
        alp: the `alp` section.
        kind: class of the objective.
        key: configuration key of the objective, for the message.
    """
    if not alp.enabled or issubclass(kind, RatioObjective):
        return
    others = ", ".join(sorted(name for name, other in OBJECTIVES.items() if issubclass(other, RatioObjective)))
    raise ConfigError(
        f"alp.enabled is true, but {key} {kind.name} uses no importance ratio: the perturbed policy is the numerator "
        f"of one, and without it the noise would only blur the gradient; set alp.enabled: false, or use one of {others}"
    )


def _leveled(level: str, kind: type[Objective], spec: Mapping[str, Any]) -> dict[str, Any]:
    if spec.get("ratio_level", level) != level:
        raise ConfigError(
            f"objective.ratio_level is '{spec['ratio_level']}', but alp.level is '{level}': "
            "give it in one of the two places"
        )
    clips = CLIPS.get(level, {}) if issubclass(kind, PPO) else {}
    own = any(name in spec for name in ("clip_low", "clip_high", "dual_clip"))
    return {**({} if own else clips), **spec, "ratio_level": level}
