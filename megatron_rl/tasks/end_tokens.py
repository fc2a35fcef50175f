"""End-of-turn tokens, as the model's files and its tokenizer name them, and the text of a turn without them."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_rl.errors import ConfigError
from megatron_rl.files import parse_json
from megatron_rl.tasks.final_answer import is_thought_tag

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_rl.types import TokenIds

_FILES = ("generation_config.json", "config.json")


def stop_token_ids(folder: Path) -> tuple[int, ...]:
    """Return the `eos_token_id` values of generation_config.json and config.json.

    Raise ConfigError if neither file has one, or one is no token id.
    """
    found = _named_ids(folder)
    if not found:
        raise ConfigError(
            f"{folder} names no eos_token_id in generation_config.json or config.json: responses could never end"
        )
    return found


def turn_end_id(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the token that ends a turn in demonstrations: the tokenizer's, if sampling stops at it."""
    ids = stop_token_ids(folder)
    return tokenizer.eos_token_id if tokenizer.eos_token_id in ids else ids[0]


@lru_cache(maxsize=16)  # because every response is stripped, and a tokenizer takes long to name its tokens
def end_texts(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """Return the texts of the tokens that end or pad a response, the longest first. A tokenizer is read once.

    They are those of the tokenizer, and of the configuration files in the folder that it was loaded from.
    """
    texts = {token for token in (tokenizer.eos_token, tokenizer.pad_token) if token}
    ids = _named_ids(Path(tokenizer.name_or_path)) if tokenizer.name_or_path else ()
    texts.update(token for token in tokenizer.convert_ids_to_tokens(list(ids)) if token)
    return tuple(sorted(texts, key=len, reverse=True))


def strip_end(tokenizer: "PreTrainedTokenizerBase", response: str) -> str:
    """Return the response without white space at its ends and without end-of-turn or padding tokens after it."""
    ends = end_texts(tokenizer)
    response = response.strip()
    while any(response.endswith(end) for end in ends):
        for end in ends:
            response = response.removesuffix(end).rstrip()
    return response


def decode_turns(tokenizer: "PreTrainedTokenizerBase", turns: Sequence["TokenIds"], stops: Iterable[int]) -> list[str]:
    """Return the text of every turn, without special tokens and stop tokens. Tags of thoughts stay.

    Args:
        tokenizer: decodes the turns.
        turns: token ids of each turn, [T].
        stops: ids at which sampling stops; a tokenizer need not mark them special.
    """
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(at for at, token in added.items() if token.special)}
    tags = {at for at, token in added.items() if is_thought_tag(token.content)}
    left_out = np.array(sorted({*special, *stops} - tags), dtype=np.int64)
    kept = [ids[~np.isin(ids, left_out)] for ids in map(np.asarray, turns)]
    return tokenizer.batch_decode(kept, skip_special_tokens=False)


def _named_ids(folder: Path) -> tuple[int, ...]:
    """Return the ids that the configuration files of a folder name; none if it has no such files."""
    found: set[int] = set()
    for path in (folder / name for name in _FILES):
        if not path.is_file():
            continue
        try:
            value = parse_json(path.read_bytes()).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path} is not a JSON object: {error}; restore the file of the model") from error
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise ConfigError(
                    f"{path}: eos_token_id is {value!r}; give the id of a token, a whole number, or a list of ids"
                )
        found.update(ids)
    return tuple(sorted(found))
