"""Checks of what a model's layers are against the configuration, before anything is allocated."""

from megatron_rl.config import Config
from megatron_rl.errors import ConfigError, PrecisionError
from megatron_rl.weights.families import ModelShape


def check_shape(config: Config, shape: ModelShape) -> None:
    """Raise ConfigError or PrecisionError if the settings do not fit the parts of the model's layers."""
    if shape.latent is not None and config.parallel.tensor > 1 and not config.parallel.sequence:
        raise ConfigError(
            f"parallel.tensor = {config.parallel.tensor} with latent attention needs parallel.sequence: true: without "
            "it megatron-core does not sum the gradients of the parts that every rank holds"
        )
    special = _special_parts(shape)
    if not special:
        return
    if config.precision.recipe != "none":
        raise PrecisionError(
            f"precision.recipe: {config.precision.recipe} is not tested with {special}: set precision.recipe: none"
        )
    if config.precision.rollout not in ("fp32", "bf16", "fp16"):
        raise PrecisionError(
            f"precision.rollout: {config.precision.rollout} is not tested with {special}: set precision.rollout: bf16"
        )
    if config.run.attribute_every:
        raise ConfigError(
            f"run.attribute_every replays the engine's products in the trainer's linears, which is not supported with "
            f"{special}: set it to 0"
        )


def _special_parts(shape: ModelShape) -> str:
    """Return in words which parts of the layers other models lack."""
    parts = {
        "latent attention": shape.latent is not None,
        "attention sinks": shape.sinks,
        "norms after attention and feed-forward network": shape.output_norms,
    }
    return " and ".join(name for name, there in parts.items() if there)
