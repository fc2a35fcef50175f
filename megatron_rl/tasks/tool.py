"""Problems with a Python tool: in each turn, the model may write code, which the sandbox runs, and read the output."""

import copy
import re
import threading
from typing import TYPE_CHECKING

import numpy as np

from megatron_rl.config import TaskConfig
from megatron_rl.errors import ConfigError
from megatron_rl.sandbox.runner import Result, Sandbox
from megatron_rl.sandbox.select import allow_unsafe, find_jail
from megatron_rl.tasks.answers import plain_answer
from megatron_rl.tasks.arithmetic import Problems
from megatron_rl.tasks.end_tokens import strip_end
from megatron_rl.tasks.final_answer import response_answer
from megatron_rl.tasks.math import MathTask
from megatron_rl.tasks.numbers_in_text import read_amount
from megatron_rl.tasks.task import Observation, Task, Turn
from megatron_rl.tasks.templates import between_turns
from megatron_rl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INSTRUCTIONS = (
    "\n\nYou may compute with Python: end your turn with one code block\n```python\nprint(1 + 1)\n```\n"
    "and the output comes back to you. Nothing is kept between blocks. "
    "When you know the final answer, write it without code as \\boxed{answer}."
)
_FENCE = "```"
_BLOCK = re.compile(r"^```python[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
_ANY_BLOCK = re.compile(r"^```.*?(?:^```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_CUT = "\n...\n"


class ToolTask(Task):
    """Problems of a file as in `MathTask`, or products of two numbers, with a Python tool.

    Without `data`, the problems are products of two numbers below max_operand: `17*23=` -> `#### 391`.

    - A turn that ends with a ```python block is a call. The block runs in a sandbox. Its output is returned between
      ```output and ```, cut to `tool_tokens` tokens.
    - A turn with an answer as in `MathTask`, outside of code and after any code, ends the response.
    - A turn with neither is void.

    Problems of a file are followed by instructions. Products are not: their models are warmed up on demonstrations.

    Args:
        config: the `task` section.
        tokenizer: tokenizes the prompts, and counts the tokens of outputs.
        seed: seed of the shuffle of products.
        max_prompt_tokens: a prompt with more tokens is an error.

    Raises:
        ConfigError: no sandbox works on this machine.
    """

    def __init__(
        self, config: TaskConfig, tokenizer: "PreTrainedTokenizerFast", *, seed: int, max_prompt_tokens: int
    ) -> None:
        self.max_turns = config.max_turns
        # `observe` runs in threads, and a tokenizer raises if two threads use it at once.
        self._tokenizer, self._lock = copy.deepcopy(tokenizer), threading.Lock()
        self._tool_tokens = config.tool_tokens
        self._special = [text for text in {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} if text]
        self._frame = ("\n", "\n")
        self._math: MathTask | None = None
        if config.data is None:
            self._make_products(config, tokenizer, seed, max_prompt_tokens)
        else:
            self._math = MathTask(config, tokenizer, max_prompt_tokens=max_prompt_tokens, instructions=INSTRUCTIONS)
            self.train, self.held_out = self._math.train, self._math.held_out
            if tokenizer.chat_template is not None:
                self._frame = between_turns(tokenizer)
        way = allow_unsafe() if config.sandbox == "unsafe" else find_jail()
        self._sandbox = Sandbox(way, seconds=config.tool_seconds, memory_mb=config.tool_memory_mb)

    def _make_products(
        self, config: TaskConfig, tokenizer: "PreTrainedTokenizerFast", seed: int, max_tokens: int
    ) -> None:
        size = config.max_operand
        if config.held_out >= size**2:
            raise ConfigError(
                f"task.max_operand {size} gives {size**2} products and task.held_out keeps {config.held_out} of them "
                "apart, which leaves none to train on: raise the former or lower the latter"
            )

        def product(number: int) -> tuple[str, int]:
            a, b = divmod(number, size)
            return f"{a}*{b}", a * b

        order = np.random.default_rng([seed % 2**64, size**2]).permutation(size**2)
        self.held_out = Problems(order[: config.held_out], product, tokenizer, max_tokens)
        self.train = Problems(order[config.held_out :], product, tokenizer, max_tokens)
        self.train.encode(f"{size - 1}*{size - 1}=")

    def verify(self, prompt: Prompt, response: str) -> float:
        """Return 1.0 if the answer of the response, outside of code, equals the ground truth, else 0.0.

        `response` is only the text of the model's last turn. It must not contain a tool's output, because the model's
        code could print an answer.
        """
        text = without_code(strip_end(self._tokenizer, response))
        if self._math is not None:
            return self._math.verify(prompt, text)
        answer = response_answer(text)
        given = None if answer is None else read_amount(plain_answer(answer))
        return float(given is not None and given.value == int(prompt.answer))

    def observe(self, prompt: Prompt, turn: str, *, last: bool) -> Observation:
        """Run the call of a turn and return its output; see `Task.observe`. A call in the last turn is not void.

        Raises ConfigError if the sandbox itself fails.
        """
        turn = strip_end(self._tokenizer, turn)
        code = extract_call(turn)
        if code is None:
            text = without_code(turn)
            answered = response_answer(text) is not None if self._math is None else self._math.answers(prompt, text)
            return Observation(void=not answered)
        if last:
            return Observation()
        result = self._sandbox.run(code)
        return Observation(self.wrapped(self._shown(result)), failed=not result.ok)

    def wrapped(self, output: str) -> str:
        """Return an output as the model reads it, with what the chat template writes between two turns of the model."""
        # An output must not end its own block or the turn.
        output = output.replace(_FENCE, "'''")
        for special in self._special:
            # One character cannot be broken up. White space among the added tokens ends nothing.
            broken = f"{special[0]} {special[1:]}" if len(special) > 1 else "" if special.strip() else special
            output = output.replace(special, broken)
        before, after = self._frame
        return f"{before}{_FENCE}output\n{self._fit(output.rstrip())}\n{_FENCE}{after}"

    def solution(self, prompt: Prompt) -> str:
        return f"#### {prompt.answer}"

    def demonstration(self, prompt: Prompt) -> list[Turn]:
        """Return a call and the answer. For a problem of a file, no code is known: return only the answer."""
        if self._math is not None:
            return [Turn(self.solution(prompt))]
        call = f"{_FENCE}python\nprint({prompt.id})\n{_FENCE}"
        return [Turn(call, self.wrapped(prompt.answer)), Turn(self.solution(prompt))]

    def close(self) -> None:
        if self._math is not None:
            self._math.close()

    def _shown(self, result: Result) -> str:
        notes = {
            "timeout": f"TimeoutError: stopped after {self._sandbox.seconds:g} seconds",
            "output": "OutputError: stopped, too much output",
        }
        note = notes.get(result.reason)
        return result.output if note is None else f"{result.output.rstrip()}\n{note}".lstrip("\n")

    def _fit(self, text: str) -> str:
        """Return at most `tool_tokens` tokens of the text: its start, and its end, where errors are named."""
        with self._lock:
            spans, room = self._spans(text), self._tool_tokens
            cut = text
            while room > 1 and len(self._spans(cut)) > self._tool_tokens:
                cut = f"{text[: spans[room - room // 2 - 1][1]]}{_CUT}{text[spans[-(room // 2)][0] :]}"
                room -= 1
        return cut if room > 1 else ""

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Return where every token of the text starts and ends."""
        return list(self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"])


def extract_call(turn: str) -> str | None:
    """Return the code of the last ```python block, or None if the turn is not a call.

    The turn is a call if nothing follows the block, or only text without an answer.
    """
    blocks = list(_BLOCK.finditer(turn))
    if not blocks or response_answer(without_code(turn[blocks[-1].end() :])) is not None:
        return None
    return blocks[-1].group(1)


def without_code(text: str) -> str:
    """Return the text without its fenced blocks. A block that is never closed reaches to the end."""
    return _ANY_BLOCK.sub("\n", text)
