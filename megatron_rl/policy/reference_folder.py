"""A folder for the reference policy: another model that the policy's parameters can hold."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

from megatron_rl.config import Config
from megatron_rl.errors import ConfigError
from megatron_rl.weights.families.rope import Plain
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.hf_model import HFModel, check_folder


def find_reference(config: Config, model: HFModel) -> HFModel | None:
    """Return the checked folder `model.reference`; None if the reference is the weights that the run starts from.

    The reference is scored by the policy's own modules, so it must have the same architecture in every size.

    Args:
        config: the resolved configuration.
        model: the model that is trained.

    Raises:
        ConfigError: the folder has another architecture; the message names the first size that differs.
        CheckpointError: a tensor is missing, is unknown or has a wrong shape.
    """
    path = config.model.reference
    if path is None:
        return None
    sizes = {"tensor_parallel": config.parallel.tensor, "expert_parallel": config.parallel.expert}
    reference = check_folder(HFFolder(path), **sizes)
    mine, other = model.shape, reference.shape
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    if longest > other.max_position_embeddings:
        raise ConfigError(
            f"rollout.max_prompt_tokens + rollout.max_new_tokens = {longest} exceeds max_position_embeddings = "
            f"{other.max_position_embeddings} of model.reference {path}"
        )
    other = replace(other, mtp_layers=mine.mtp_layers)  # these layers are not scored
    if isinstance(mine.rope.scaling, Plain):  # then frequencies do not depend on it
        other = replace(other, max_position_embeddings=mine.max_position_embeddings)
    found = _first_difference(mine, other)
    if reference.family is not model.family:
        found = f"architecture {reference.family.architectures[0]} instead of {model.family.architectures[0]}"
    if found is not None:
        raise ConfigError(
            f"model.reference {path} has {found}, which {model.path} has: the trainer scores both with the same "
            "modules, so give a folder of the same architecture"
        )
    return reference


def _first_difference(mine: Any, other: Any, name: str = "") -> str | None:
    """Return the first part of two equal kinds of dataclass that differs, as text; None if they are equal."""
    if not is_dataclass(mine) or type(mine) is not type(other):
        return None if mine == other else f"{name} {other} instead of {mine}"
    for part in fields(mine):
        inner = f"{name}.{part.name}" if name else part.name
        found = _first_difference(getattr(mine, part.name), getattr(other, part.name), inner)
        if found is not None:
            return found
    return None
