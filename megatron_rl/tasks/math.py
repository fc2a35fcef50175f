"""Problems with a final answer from a JSONL or parquet file."""

import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.config import TaskConfig
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.tasks.answers import UnreadableAnswerError, read_answer, same_answer
from megatron_rl.tasks.end_tokens import strip_end
from megatron_rl.tasks.final_answer import MARK, count_boxes, ends_in_thought, ground_truth, response_answer
from megatron_rl.tasks.grader import Grader
from megatron_rl.tasks.rows import MISSING, find_column, prompt_cell, read_rows, text_cell
from megatron_rl.tasks.task import Task, check_spelled, encode_plain
from megatron_rl.tasks.templates import render_chats
from megatron_rl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A text with more characters is compared with what its tokens can hold before it is tokenized.
_LONG_TEXT = 100_000


class MathTask(Task):
    """Problems with one final answer each, in the columns `prompt_column` and `answer_column`.

    The prompt is a text or a list of chat messages. With `instructions` after its end it goes through the tokenizer's
    chat template. Without a chat template it must be a text, and a newline follows it. `final_answer` says where an
    answer stands, and `answers` how two are compared. A ground truth without `####` and \\boxed{} is all of its column.
    With a reward of the user's own, the answer column may be absent, and is not checked. The other columns are the
    prompt's metadata. The held-out rows are those of `eval_data`, or the last `held_out` rows of `data`.

    The constructor reads, checks and tokenizes everything.

    Args:
        config: the `task` section.
        tokenizer: tokenizes the prompts.
        max_prompt_tokens: a prompt with more tokens is an error.
        instructions: text after the problem in a prompt.

    Raises:
        UserError: names file and line of the first malformed row or too long prompt.
        ConfigError: nothing is left to train on.
    """

    def __init__(
        self,
        config: TaskConfig,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        max_prompt_tokens: int,
        instructions: str = "",
    ) -> None:
        if config.data is None:
            raise ConfigError("task.data is required for task.name: math")
        self._tokenizer = tokenizer
        self._grader = Grader()
        self._thinking: set[tuple[int, ...]] = set()  # prompts that end inside a thought
        rows = self._read(config.data, config, tokenizer, max_prompt_tokens, instructions)
        if config.eval_data is not None:
            held_out = self._read(config.eval_data, config, tokenizer, max_prompt_tokens, instructions)
            self.train, self.held_out = rows, held_out
            return
        if config.held_out >= len(rows):
            raise ConfigError(
                f"{config.data} has {len(rows)} rows and task.held_out keeps {config.held_out} of them apart, "
                "which leaves none to train on: lower task.held_out or give task.eval_data"
            )
        cut = len(rows) - config.held_out
        self.train, self.held_out = rows[:cut], rows[cut:]

    def verify(self, prompt: Prompt, response: str) -> float:
        """Return 1.0 if the final answer of the response equals the ground truth, else 0.0."""
        answer = self._answer(prompt, strip_end(self._tokenizer, response))
        return float(answer is not None and same_answer(read_answer(prompt.answer), answer, self._grader))

    def answers(self, prompt: Prompt, response: str) -> bool:
        """Return whether a response, without end-of-turn tokens, gives an answer, right or wrong."""
        return self._answer(prompt, response) is not None

    def _answer(self, prompt: Prompt, response: str) -> str | None:
        return response_answer(response, thinking=prompt.tokens in self._thinking, truth=prompt.answer)

    def solution(self, prompt: Prompt) -> str:
        if not prompt.answer:
            raise UserError(
                f"prompt '{prompt.id}' has no answer in its data row, so there is no solution to learn from"
            )
        ended = "</think>\n\n" if prompt.tokens in self._thinking else ""
        return f"{ended}{MARK} {prompt.answer}"

    def close(self) -> None:
        self._grader.close()

    def _read(
        self,
        path: Path,
        config: TaskConfig,
        tokenizer: "PreTrainedTokenizerFast",
        max_prompt_tokens: int,
        instructions: str,
    ) -> list[Prompt]:
        """Return the prompts of a file, of which every ground truth verifies itself, and add a line to the summary."""
        prompts, thinking = _load(path, config, tokenizer, max_prompt_tokens, instructions)
        self._thinking |= thinking
        if config.reward is not None:
            return prompts
        for prompt in prompts:
            if not self.verify(prompt, self.solution(prompt)):
                raise UserError(
                    f"{path}:{prompt.id.rpartition(':')[2]}: the ground truth {reprlib.repr(prompt.answer)} does not "
                    "verify itself: it reads as a heading or label; correct or remove the row"
                )
        line = _kinds(path, prompts, config.answer_column)
        self.summary = f"{self.summary}\n{line}".lstrip("\n")
        return prompts


def _load(
    path: Path, config: TaskConfig, tokenizer: "PreTrainedTokenizerFast", max_prompt_tokens: int, instructions: str
) -> tuple[list[Prompt], set[tuple[int, ...]]]:
    """Return the prompts of a file, and the tokens of those that end inside a thought."""
    rows = list(read_rows(path))
    if not rows:
        raise UserError(f"{path} has no rows")
    places = [place for place, _ in rows]
    asked = [prompt_cell(place, row, config.prompt_column, "task.prompt_column") for place, row in rows]
    answers = [_answer(place, row, config) for place, row in rows]
    _check_characters(asked, places, tokenizer, max_prompt_tokens)
    texts, encoded = _encode(tokenizer, asked, instructions, places)
    long = [at for at, tokens in enumerate(encoded) if len(tokens) > max_prompt_tokens]
    if long:
        longest = max(len(encoded[at]) for at in long)
        raise UserError(
            f"{places[long[0]]}: the prompt has {len(encoded[long[0]])} tokens, rollout.max_prompt_tokens is "
            f"{max_prompt_tokens}; {len(long)} of {len(places)} prompts are too long: "
            f"raise rollout.max_prompt_tokens to {longest} or remove them"
        )
    prompts = [
        Prompt(
            id=f"{path.name}:{place.rpartition(':')[2]}",
            text=_last_text(prompt),
            tokens=tokens,
            answer=answer,
            messages=() if isinstance(prompt, str) else prompt,
            metadata={name: value for name, value in row.items() if name != config.prompt_column},
        )
        for (place, row), prompt, tokens, answer in zip(rows, asked, encoded, answers, strict=True)
    ]
    return prompts, {tokens for text, tokens in zip(texts, encoded, strict=True) if ends_in_thought(text)}


def _last_text(prompt: str | tuple[dict[str, Any], ...]) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _check_characters(
    asked: Sequence[str | tuple[dict[str, Any], ...]],
    places: list[str],
    tokenizer: "PreTrainedTokenizerFast",
    max_prompt_tokens: int,
) -> None:
    """Raise UserError for a prompt that is too long however it is tokenized: a tokenizer needs 100 times its memory."""
    long = [at for at, prompt in enumerate(asked) if len(_last_text(prompt)) > _LONG_TEXT]
    if not long:
        return
    most = max_prompt_tokens * max(map(len, tokenizer.get_vocab()))
    for at in long:
        if len(_last_text(asked[at])) > most:
            raise UserError(
                f"{places[at]}: the prompt has {len(_last_text(asked[at])):,} characters, which cannot be "
                f"rollout.max_prompt_tokens: {max_prompt_tokens} tokens; remove the row"
            )


def _answer(place: str, row: Mapping[str, Any], config: TaskConfig) -> str:
    if config.reward is not None and find_column(row, config.answer_column) is MISSING:
        return ""
    text = text_cell(place, row, config.answer_column, "task.answer_column")
    truth = ground_truth(text)
    if config.reward is not None:
        return truth or text.strip()
    if truth is None:
        raise UserError(
            f"{place}: '{config.answer_column}' holds no final answer: what it marks by '{MARK}' or \\boxed{{}} is "
            "empty or cut off; correct or remove the row"
        )
    truth = " ".join(truth.split())
    try:
        read_answer(truth)
    except UnreadableAnswerError as error:
        raise UserError(
            f"{place}: the ground truth {reprlib.repr(truth)} in '{config.answer_column}' {error}, so no response "
            "could be right; correct or remove the row, or set task.answer_column"
        ) from error
    return truth


def _kinds(path: Path, prompts: Sequence[Prompt], column: str) -> str:
    """Return how many ground truths of each kind a file has."""
    kinds = Counter(read_answer(prompt.answer).kind for prompt in prompts)
    several = sum(count_boxes(text) > 1 for p in prompts if isinstance(text := find_column(p.metadata, column), str))
    counts = ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common())
    boxes = f"; {several:,} have several boxes, of which the last counts" if several else ""
    return f"{path}: {len(prompts):,} ground truths ({counts}){boxes}"


def _encode(
    tokenizer: "PreTrainedTokenizerFast",
    asked: Sequence[str | tuple[dict[str, Any], ...]],
    instructions: str,
    places: list[str],
) -> tuple[list[str], list[tuple[int, ...]]]:
    """Return the text and the tokens of every prompt, with the instructions at the end of its last message."""
    if tokenizer.chat_template is None:
        for place, prompt in zip(places, asked, strict=True):
            if not isinstance(prompt, str):
                raise ConfigError(f"{place}: the prompt is chat messages, and the tokenizer has no chat template")
        texts = [f"{prompt}{instructions}\n" for prompt in asked]
        return texts, encode_plain(tokenizer, texts)
    chats = []
    for prompt in asked:
        *before, last = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
        chats.append([*before, {**last, "content": last["content"] + instructions}])
    texts = render_chats(tokenizer, chats, places)
    # The template has written the special tokens already.
    encoded = [tuple(row) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    for text, tokens in zip(texts, encoded, strict=True):
        check_spelled(tokenizer, text, tokens)
    return texts, encoded
