"""Checks of mixture-of-experts settings that need only the configuration and the model's shape."""

from megatron_rl.config import Config
from megatron_rl.errors import ConfigError, PrecisionError
from megatron_rl.weights.families import ModelShape


def check_experts(config: Config, shape: ModelShape) -> None:
    """Raise ConfigError or PrecisionError if the settings do not fit the model's experts, or a dense model."""
    if shape.experts is None:
        if config.rollout.routing_replay:
            raise ConfigError(
                "rollout.routing_replay: true replays the choice of experts, "
                f"and {config.model.path} is a dense model: set it to false"
            )
        return
    if config.rollout.routing_replay and shape.experts.dense_layers:
        raise ConfigError(
            "rollout.routing_replay: true needs experts in every layer, because engines report none for layers without "
            f"experts, and {config.model.path} has such layers: set it to false"
        )
    if config.parallel.tensor > 1 and not config.parallel.sequence:
        raise ConfigError(
            f"parallel.tensor = {config.parallel.tensor} with experts needs parallel.sequence: true: "
            "without it every rank of a tensor-parallel group would send the same tokens to the experts"
        )
    if config.precision.recipe != "none":
        raise PrecisionError(
            f"precision.recipe: {config.precision.recipe} quantizes the layers' matrix products, "
            "and those of experts are not supported: set precision.recipe: none "
            "(the engines' weights may be quantized, precision.rollout)"
        )
    if config.precision.train == "fp16":
        raise PrecisionError(
            "precision.train: fp16 needs one loss scale, and megatron-core's optimizer of experts has one of its own: "
            "set precision.train: bf16"
        )
    if config.run.attribute_every:
        raise ConfigError(
            "run.attribute_every replays the engine's products in the trainer's linears, "
            "which is not supported for experts: set it to 0"
        )
    if config.precision.rollout_activations == "fp8" and config.rollout.engine == "embedded":
        raise PrecisionError(
            "precision.rollout_activations: fp8 is not emulated for experts by the embedded engine: set it to none, or "
            "rollout.engine: sglang"
        )
