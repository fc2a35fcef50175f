"""Checks of the reference policy's folder: the trained model's architecture and tokens."""

from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.errors import ConfigError
from megatron_rl.policy.reference_folder import find_reference
from megatron_rl.tasks.templates import load_tokenizer
from megatron_rl.weights.hf_model import HFModel


def check_reference(config: Config, model: HFModel) -> None:
    """Check that `model.reference`, if it is set, can score what the trained model samples.

    Args:
        config: the resolved configuration.
        model: the model that is trained.

    Raises:
        ConfigError: the folder has another architecture, or another or no token at an id of the trained model's.
        CheckpointError: a tensor is missing, is unknown or has a wrong shape.
    """
    if find_reference(config, model) is None:
        return
    assert config.model.reference is not None
    ours, theirs = _tokens(model.path, "model.path"), _tokens(config.model.reference, "model.reference")
    other = next((id for id in sorted(ours) if ours[id] != theirs.get(id)), None)
    if other is not None:
        raise ConfigError(
            f"model.reference {config.model.reference}: its tokenizer has {theirs.get(other)!r} as token {other}, and "
            f"{model.path} has {ours[other]!r}: it would score other texts than were sampled; give a model of the same "
            "tokenizer"
        )


def _tokens(folder: Path, key: str) -> dict[int, str]:
    """Return the token of every id of a folder's tokenizer."""
    return {id: token for token, id in load_tokenizer(folder, key).get_vocab().items()}
