"""Reads the settings in a model folder: configuration, tokenizer and end-of-text tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig

from megatron_rl.errors import CheckpointError, first_line

T = TypeVar("T")
ATTENTION = {"full_attention", "sliding_attention"}
_CONFIG, _GENERATION, _TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"


def read_config(folder: Path) -> PreTrainedConfig:
    """Return the configuration of a model folder. Raises CheckpointError unless it is of a causal language model."""
    if not (folder / _CONFIG).is_file():
        raise CheckpointError(f"no config.json in {folder}: the engine needs a Hugging Face folder")
    config = _read_by_transformers(folder / _CONFIG, lambda: AutoConfig.from_pretrained(folder))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(f"{folder}/config.json: model_type '{config.model_type}' is not a causal language model")
    other = set(getattr(config, "layer_types", None) or ()) - ATTENTION
    if other:
        raise CheckpointError(
            f"{folder}/config.json: layers of type {sorted(other)} are not supported by the embedded engine"
        )
    return config


def read_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a model folder, or None if it has none. Raises CheckpointError if it is damaged."""
    if not (folder / _TOKENIZER).is_file():
        return None
    return _read_by_transformers(folder / _TOKENIZER, lambda: AutoTokenizer.from_pretrained(folder))


def eos_ids(folder: Path, config: PreTrainedConfig, tokenizer: Any) -> frozenset[int]:
    """Return the end-of-text tokens of the model, its generation settings and its tokenizer.

    SGLang stops at all of them.

    Args:
        folder: folder that may hold generation_config.json.
        config: configuration of the model.
        tokenizer: tokenizer of the model.

    Raises:
        CheckpointError: the generation settings are damaged, or name what is no token id.
    """
    found: list[Any] = [getattr(config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    if (folder / _GENERATION).is_file():
        settings = _read_by_transformers(folder / _GENERATION, lambda: GenerationConfig.from_pretrained(folder))
        found.append(settings.eos_token_id)
    flat = [token for entry in found if entry is not None for token in (entry if isinstance(entry, list) else [entry])]
    for token in flat:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise CheckpointError(
                f"{folder}: eos_token_id of {_CONFIG} or {_GENERATION} names {str(token)[:100]!r}; give the id of a "
                "token, a whole number, or a list of ids"
            )
    return frozenset(flat)


def _read_by_transformers(file: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except Exception as error:  # the file is the user's, and the library raises what its parsers raise
        raise CheckpointError(
            f"{file} cannot be read ({type(error).__name__}: {first_line(error)}): fetch the file again, or correct it"
        ) from error
