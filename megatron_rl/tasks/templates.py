"""Chat templates: rendered prompts, checked to hold their question, and what stands between two turns."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.errors import ConfigError
from megatron_rl.tasks.end_tokens import end_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = Sequence[Mapping[str, Any]]


def load_tokenizer(folder: Path, key: str = "model.path") -> Any:
    """Return the tokenizer in a model's folder, which `key` names. Raise ConfigError if it cannot be loaded."""
    from transformers import AutoTokenizer  # here, because it takes a second, and most of this room needs no models

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the files are the user's, and the library raises what its parsers raise
        raise ConfigError(
            f"{key} {folder}: the tokenizer cannot be loaded ({type(error).__name__}: {_first_line(error)}); "
            "restore tokenizer.json and tokenizer_config.json of the model"
        ) from error


def render_chats(tokenizer: "PreTrainedTokenizerBase", chats: Sequence[Chat], places: Sequence[str]) -> list[str]:
    """Return every chat as the model reads it, up to where the assistant's turn begins.

    Args:
        tokenizer: its chat template renders.
        chats: messages with the texts role and content.
        places: file:line of every chat, for messages.

    Raises:
        ConfigError: the template is not valid, raises, renders nothing, or leaves out a message that is no
            assistant's. The message names the template and the first such chat.
    """
    texts = [_render(tokenizer, chat, place) for chat, place in zip(chats, places, strict=True)]
    for text, chat, place in zip(texts, chats, places, strict=True):
        for at, message in enumerate(chat, start=1):
            if message["role"] != "assistant" and not _holds(text, message["content"]):
                raise ConfigError(
                    f"{place}: {_named(tokenizer)} leaves out message {at} (role {message['role']}): the rendered "
                    f"prompt is {_cut(text)}; repair the template, or remove it to send plain texts"
                )
    return texts


def between_turns(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    """Return what the chat template writes before and after a user's message between two turns of the assistant.

    The end-of-turn token of the first turn is not included, because the model has written it. Raises ConfigError if
    the template does not render such a conversation.
    """
    turn, message = "megatronrlturn", "megatronrlmessage"
    roles = (("user", "question"), ("assistant", turn), ("user", message))
    chat = _render(tokenizer, [{"role": role, "content": content} for role, content in roles], "a second message")
    if chat.count(turn) != 1 or chat.count(message) != 1 or chat.index(turn) > chat.index(message):
        raise ConfigError(f"{_named(tokenizer)} does not render a user's message after an assistant's turn")
    before, _, after = chat.partition(turn)[2].partition(message)
    written = next((end for end in end_texts(tokenizer) if before.lstrip().startswith(end)), "")
    return before.lstrip().removeprefix(written) if written else before, after


def _render(tokenizer: "PreTrainedTokenizerBase", chat: Chat, place: str) -> str:
    try:
        text = tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program of the model's author and may raise anything
        raise ConfigError(
            f"{place}: {_named(tokenizer)} cannot render the prompt ({type(error).__name__}: {_first_line(error)}); "
            "repair the template, give it messages that it takes, or remove it to send plain texts"
        ) from error
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{place}: {_named(tokenizer)} renders nothing; repair it, or remove it to send plain texts")
    return text


def _holds(text: str, content: str) -> bool:
    """Return whether a rendered prompt holds a message, as it is, trimmed, or as JSON."""
    content = content.strip()
    return content in text or any(json.dumps(content, ensure_ascii=kind)[1:-1] in text for kind in (False, True))


def _named(tokenizer: "PreTrainedTokenizerBase") -> str:
    folder = Path(tokenizer.name_or_path or "")
    files = (folder / "chat_template.jinja", folder / "chat_template.json", folder / "tokenizer_config.json")
    place = next((f" ({file})" for file in files if tokenizer.name_or_path and file.is_file()), "")
    return f"the tokenizer's chat template{place}"


def _first_line(error: Exception) -> str:
    return _cut(str(error).strip().partition("\n")[0])


def _cut(text: str) -> str:
    return repr(text) if len(text) <= 200 else f"{text[:200]!r}..."
