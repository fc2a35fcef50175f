"""Mathematical word problems from a JSONL or parquet file, verified by math-verify."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.config import TaskConfig
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.tasks.grader import Grader
from megatron_rl.tasks.rows import MISSING, find_column, prompt_cell, read_rows, text_cell
from megatron_rl.tasks.task import Task, encode_plain, strip_end
from megatron_rl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MARK = "####"
_BOXES = ("\\boxed{", "\\fbox{")


class MathTask(Task):
    """Problems with one final answer each, in the columns `prompt_column` and `answer_column`.

    The prompt is a text or a list of chat messages. With `instructions` after its end it goes through the tokenizer's
    chat template. Without a chat template it must be a text, and a newline follows it. The ground truth is what follows
    the last `####` of the answer column, else its last \\boxed{}, else all of it. With a reward of the user's own, the
    answer column may be absent. The other columns are the prompt's metadata. The held-out rows are those of
    `eval_data`, or the last `held_out` rows of `data`.

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
        rows = _load(config.data, config, tokenizer, max_prompt_tokens, instructions)
        if config.eval_data is not None:
            held_out = _load(config.eval_data, config, tokenizer, max_prompt_tokens, instructions)
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
        """Return 1.0 if the last `####` or \\boxed{} answer of the response equals the ground truth, else 0.0."""
        answer = response_answer(strip_end(self._tokenizer, response))
        return float(answer is not None and self._grader.equal(prompt.answer, answer))

    def solution(self, prompt: Prompt) -> str:
        if not prompt.answer:
            raise UserError(
                f"prompt '{prompt.id}' has no answer in its data row, so there is no solution to learn from"
            )
        return f"{_MARK} {prompt.answer}"

    def close(self) -> None:
        self._grader.close()


def ground_truth(text: str) -> str:
    """Return the final answer in the text of an answer column."""
    if _MARK in text:
        return text.rpartition(_MARK)[2].strip().rstrip(".")
    boxed = _last_boxed(text)
    return text.strip() if boxed is None else boxed[1]


def response_answer(text: str) -> str | None:
    """Return the last answer of a response: the later of its last `####` line and its last box. None without either."""
    boxed = _last_boxed(text)
    mark = text.rfind(_MARK)
    if mark < 0 or (boxed is not None and boxed[0] > mark):
        return None if boxed is None else boxed[1]
    return text[mark + len(_MARK) :].strip().partition("\n")[0].strip().rstrip(".")


def _last_boxed(text: str) -> tuple[int, str] | None:
    """Return where the last box starts, and its content. None if there is none or it is never closed."""
    start, box = max((text.rfind(box), box) for box in _BOXES)
    if start < 0:
        return None
    depth = 1
    for at in range(start + len(box), len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return start, text[start + len(box) : at].strip()
    return None


def _load(
    path: Path, config: TaskConfig, tokenizer: "PreTrainedTokenizerFast", max_prompt_tokens: int, instructions: str
) -> list[Prompt]:
    if not path.is_file():
        raise UserError(f"no data file at {path}; task.data and task.eval_data must name JSONL or parquet files")
    rows = list(read_rows(path))
    if not rows:
        raise UserError(f"{path} has no rows")
    asked = [prompt_cell(place, row, config.prompt_column, "task.prompt_column") for place, row in rows]
    answers = [_answer(place, row, config) for place, row in rows]
    places = [place for place, _ in rows]
    encoded = _encode(tokenizer, asked, instructions, places)
    long = [at for at, tokens in enumerate(encoded) if len(tokens) > max_prompt_tokens]
    if long:
        longest = max(len(encoded[at]) for at in long)
        raise UserError(
            f"{places[long[0]]}: the prompt has {len(encoded[long[0]])} tokens, rollout.max_prompt_tokens is "
            f"{max_prompt_tokens}; {len(long)} of {len(places)} prompts are too long: "
            f"raise rollout.max_prompt_tokens to {longest} or remove them"
        )
    return [
        Prompt(
            id=f"{path.name}:{place.rpartition(':')[2]}",
            text=prompt if isinstance(prompt, str) else prompt[-1]["content"],
            tokens=tokens,
            answer=answer,
            messages=() if isinstance(prompt, str) else prompt,
            metadata={name: value for name, value in row.items() if name != config.prompt_column},
        )
        for (place, row), prompt, tokens, answer in zip(rows, asked, encoded, answers, strict=True)
    ]


def _answer(place: str, row: Mapping[str, Any], config: TaskConfig) -> str:
    if config.reward is not None and find_column(row, config.answer_column) is MISSING:
        return ""
    answer = ground_truth(text_cell(place, row, config.answer_column, "task.answer_column"))
    if not answer:
        raise UserError(f"{place}: '{config.answer_column}' holds no final answer")
    return answer


def _encode(
    tokenizer: "PreTrainedTokenizerFast",
    asked: Sequence[str | tuple[dict[str, Any], ...]],
    instructions: str,
    places: list[str],
) -> list[tuple[int, ...]]:
    """Return the tokens of every prompt, with the instructions at the end of its last message."""
    if tokenizer.chat_template is None:
        for place, prompt in zip(places, asked, strict=True):
            if not isinstance(prompt, str):
                raise ConfigError(f"{place}: the prompt is chat messages, and the tokenizer has no chat template")
        return encode_plain(tokenizer, [f"{prompt}{instructions}\n" for prompt in asked])
    chats = []
    for prompt in asked:
        *before, last = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
        chats.append([*before, {**last, "content": last["content"] + instructions}])
    texts: Any = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    # The template has written the special tokens already.
    return [tuple(row) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
