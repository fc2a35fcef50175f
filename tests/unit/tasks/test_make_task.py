"""A task of the user's own: built as the built-in ones are, and refused with file:line if it cannot work."""

from pathlib import Path

import pytest

from megatron_rl.config import TaskConfig
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.tasks import Task, make_task
from tests.unit.tasks.char_tokenizer import char_tokenizer

TOKENIZER = char_tokenizer()
MINE = """\
from typing import Literal

from pydantic import BaseModel

from megatron_rl.tasks import Prompt, Task, encode_plain


class Words(BaseModel):
    words: list[str]
    case: Literal["upper", "lower"] = "upper"


class Mine(Task):
    Options = Words

    def __init__(self, options, tokenizer, *, seed):
        tokens = encode_plain(tokenizer, options.words)
        prompts = [Prompt(w, w, t, getattr(w, options.case)()) for w, t in zip(options.words, tokens)]
        self.train, self.held_out, self.seed = prompts[1:], prompts[:1], seed

    def verify(self, prompt, response):
        return float(response == prompt.answer)
"""
DUCK = """\
from megatron_rl.tasks import Prompt, Turn


class Duck:
    max_turns = 1
    train = [Prompt("p", "q", (3,), "a")]
    held_out = ()

    def verify(self, prompt, response): return 0.5
    def observe(self, prompt, turn, *, last): ...
    def solution(self, prompt): return "a"
    def demonstration(self, prompt): return [Turn("a")]
    def close(self): ...
"""


def made(tmp_path: Path, text: str, name: str = "Mine", **keys) -> Task:
    file = tmp_path / "mine.py"
    file.write_text(text, encoding="utf-8")
    return make_task(TaskConfig(name=f"{file}:{name}", **keys), TOKENIZER, seed=7, max_prompt_tokens=9)


def test_a_class_takes_the_arguments_that_it_names_and_its_checked_options(tmp_path):
    task = made(tmp_path, MINE, options={"words": ["ab", "cd", "ef"], "case": "lower"})
    assert [p.text for p in task.train] == ["cd", "ef"] and [p.answer for p in task.held_out] == ["ab"]
    assert task.seed == 7 and task.verify(task.train[0], "cd") == 1.0


def test_a_class_needs_only_the_methods_of_a_task(tmp_path):
    assert made(tmp_path, DUCK, "Duck").verify(None, "") == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"key 'task.options.words' is missing and has no default"),
        ({"words": 3}, r"'task.options.words' is 3: Input should be a valid list"),
        ({"words": ["a", "b"], "case": "title"}, r"'task.options.case' is 'title': .*'upper' or 'lower'"),
        ({"words": ["a", "b"], "cas": "lower"}, r"unknown key 'task.options.cas'; did you mean 'case'\?"),
    ],
)
def test_options_are_checked_by_the_model_of_the_class(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        made(tmp_path, MINE, options=options)


def test_options_that_no_class_declares_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"task.options has a, but task.name: .*mine.py:Duck declares no options"):
        made(tmp_path, DUCK, "Duck", options={"a": 1})
    with pytest.raises(ConfigError, match=r"task.options has a, but task.name: arithmetic declares no options"):
        make_task(TaskConfig(options={"a": 1}), TOKENIZER, seed=0, max_prompt_tokens=9)


def without(text: str, line: str) -> str:
    assert line in text
    return text.replace(line, "")


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (MINE, "Mien", r"has no 'Mien'; did you mean 'Mine'\?"),
        (without(MINE, "    def verify(self, prompt, response):\n        return float(response == prompt.answer)\n"),
         "Mine", r"Mine \(.*mine.py:13\) has no method 'verify\(prompt, response\)'"),
        (MINE.replace("verify(self, prompt, response)", "verify(self, prompt)"),
         "Mine", r"Mine.verify \(.*mine.py:21\) cannot be called with \(prompt, response\): too many positional"),
        (MINE.replace("def verify", "async def verify"), "Mine", r"Mine.verify \(.*mine.py:21\) is async"),
        (without(DUCK, "    def close(self): ...\n"), "Duck", r"Duck \(.*mine.py:4\) has no method 'close\(\)'"),
        (DUCK.replace("turn, *, last", "turn"), "Duck", r"Duck.observe \(.*:10\) cannot be called with .* last=...\)"),
        (MINE.replace("*, seed)", "*, sede)"), "Mine", r"Mine \(.*mine.py:13\) requires the argument 'sede'"),
        (DUCK.replace('train = [Prompt("p", "q", (3,), "a")]', "train = None"), "Duck", r"'train' None; set it to a"),
        (DUCK.replace('Prompt("p", "q", (3,), "a")', '"p"'), "Duck", r"has a str in 'train'; it must hold Prompt"),
        (DUCK.replace('Prompt("p", "q", (3,), "a")', ""), "Duck", r"nothing to train on: 'train' is empty"),
        (DUCK.replace("max_turns = 1", "max_turns = 0"), "Duck", r"has max_turns 0; it must be a whole number"),
        (MINE.replace("Options = Words", "Options = dict"), "Mine", r"Options is <class 'dict'>; it must be a"),
        ("def mine(): ...\n", "mine", r"mine.py:mine \(.*mine.py:1\) is no class"),
        ("class Mine(:\n", "Mine", r"importing .*mine.py:1 raised SyntaxError"),
    ],
)  # fmt: skip
def test_a_class_that_cannot_work_is_refused_with_file_and_line(tmp_path, text, name, message):
    options = {"options": {"words": ["a", "b"]}} if "Options = Words" in text else {}
    with pytest.raises(ConfigError, match=message):
        made(tmp_path, text, name, **options)


def test_what_the_constructor_raises_is_refused_with_file_and_line(tmp_path):
    text = DUCK + "\n    def __init__(self):\n        1 / 0\n"
    with pytest.raises(ConfigError, match=r"Duck \(.*:4\) raised ZeroDivisionError: division by zero \(.*mine.py:16\)"):
        made(tmp_path, text, "Duck")
    other = tmp_path / "other"  # a file is imported once
    other.mkdir()
    text = text.replace("1 / 0", "from megatron_rl.errors import UserError; raise UserError('rows.txt:3: no')")
    with pytest.raises(UserError, match=r"^rows.txt:3: no$"):
        made(other, text, "Duck")


def test_there_is_no_such_file(tmp_path):
    with pytest.raises(ConfigError, match=r"task.name: there is no file .*/none.py"):
        make_task(TaskConfig(name=f"{tmp_path}/none.py:Mine"), TOKENIZER, seed=0, max_prompt_tokens=9)
