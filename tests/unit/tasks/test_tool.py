"""A turn of the model is a call, an answer or neither. A tool's output goes to the model and is never an answer."""

import json
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from megatron_rl.config import TaskConfig
from megatron_rl.errors import ConfigError
from megatron_rl.sandbox.select import find_jail
from megatron_rl.tasks import make_task
from megatron_rl.tasks import tool as tool_module
from megatron_rl.tasks.task import Observation
from megatron_rl.tasks.tool import INSTRUCTIONS, between_turns, extract_call, without_code
from tests.unit.tasks.char_tokenizer import char_tokenizer

PLAIN, CHAT = char_tokenizer(), char_tokenizer(chat=True)


def jail_or_skip():
    try:
        find_jail()
    except ConfigError as error:
        pytest.skip(str(error))


def make_tool(tokenizer=PLAIN, **keys):
    jail_or_skip()
    keys = {"held_out": 4, "max_operand": 20, "tool_tokens": 120, **keys}
    return make_task(TaskConfig(name="tool", **keys), tokenizer, seed=0, max_prompt_tokens=1000)


@pytest.fixture(scope="module")
def task():
    task = make_tool()
    yield task
    task.close()


@pytest.fixture(scope="module")
def from_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"question": f"What is {n}/2?", "answer": f"so #### {n}/2"} for n in range(1, 7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = make_tool(data=path)
    yield task
    task.close()


def block(code: str) -> str:
    return f"```python\n{code}\n```"


def heard(task, turn: str, *, last: bool = False) -> Observation:
    return task.observe(task.train[0], turn, last=last)


# Problems ----------------------------------------------------------------------------------------------------


def test_without_data_the_problems_are_all_products_once(task):
    problems = [*task.train, *task.held_out]
    assert sorted(p.id for p in problems) == sorted(f"{a}*{b}" for a in range(20) for b in range(20))
    assert all(p.text == f"{p.id}=" and int(p.answer) == eval(p.id) for p in problems)
    assert "".join(PLAIN.convert_ids_to_tokens(task.train[0].tokens)) == task.train[0].text


def test_problems_of_a_file_come_with_instructions(from_file):
    prompt = from_file.train[0]
    assert "".join(PLAIN.convert_ids_to_tokens(prompt.tokens)) == f"What is 1/2?{INSTRUCTIONS}\n"
    assert extract_call(INSTRUCTIONS.partition("and the output")[0]) == "print(1 + 1)\n"


def test_too_few_products_are_refused():
    with pytest.raises(ConfigError, match="gives 4 products"):
        make_tool(max_operand=2, held_out=4)


def test_without_a_jail_the_task_is_refused_unless_the_user_says_unsafe(monkeypatch):
    def no_jail():
        raise ConfigError("no jail")

    monkeypatch.setattr(tool_module, "find_jail", no_jail)
    with pytest.raises(ConfigError, match="no jail"):
        make_task(TaskConfig(name="tool"), PLAIN, seed=0, max_prompt_tokens=100)
    task = make_task(TaskConfig(name="tool", sandbox="unsafe"), PLAIN, seed=0, max_prompt_tokens=100)
    assert heard(task, block("print(6 * 7)")).text == "\n```output\n42\n```\n"


# A demonstration equals a real response ----------------------------------------------------------------------


def test_the_demonstration_is_what_the_sandbox_answers_and_it_verifies(task):
    for prompt in task.train[:3]:
        call, answer = task.demonstration(prompt)
        assert heard(task, call.text) == Observation(call.observation)
        assert heard(task, answer.text) == Observation()
        assert task.verify(prompt, f"{answer.text}<eos>") == 1.0
        assert answer.observation is None


def test_problems_of_a_file_are_demonstrated_by_their_answer(from_file):
    prompt = from_file.train[0]
    (turn,) = from_file.demonstration(prompt)
    assert from_file.verify(prompt, turn.text) == 1.0


# What a turn is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turn", "code"),
    [
        (block("print(1)"), "print(1)\n"),
        (f"First I compute.\n{block('x = 2')}\nSo:<eos>", "x = 2\n"),
        (f"{block('1')}\nthen\n{block('2')}", "2\n"),
        (f"#### 7\nno, let me see\n{block('3')}", "3\n"),
        (f"{block('print(1)')}\n#### 5", None),
        (f"{block('print(1)')}\nIt is \\boxed{{5}}.", None),
        (f"{block('1')}\n```\n#### 5\n```", "1\n"),
        ("```python\nprint(1)", None),
        ("```\nprint(1)\n```", None),
        ("print(1)", None),
        ("", None),
        ("```python\nprint('''```''')\n```", "print('''```''')\n"),
        ("```python\n```", ""),
    ],
)
def test_a_call_is_the_last_python_block_that_no_answer_follows(turn, code):
    assert extract_call(turn) == code


@pytest.mark.parametrize("turn", ["#### 6", "so \\boxed{6}", f"{block('print(5)')}\n#### 6<eos>"])
def test_an_answer_ends_the_response(task, turn):
    assert heard(task, turn) == Observation()


@pytest.mark.parametrize(
    "turn", ["", "hmm", "```python\nprint(1)", "```\n#### 6\n```", "```python\n#### 6", "####", "<eos>"]
)
def test_a_turn_with_neither_is_void(task, turn):
    void = heard(task, turn).void
    assert void is (turn != "####")  # An empty answer is a wrong answer.


def test_an_output_comes_back_between_fences(task):
    assert heard(task, block("print(2)\nprint(3)")) == Observation("\n```output\n2\n3\n```\n")
    assert heard(task, block("x = 1")) == Observation("\n```output\n\n```\n")


def test_an_error_comes_back_with_its_name_and_so_does_the_end_of_time(task):
    assert "ZeroDivisionError: division by zero\n```\n" in heard(task, block("1 / 0")).text
    hasty = make_tool(tool_seconds=0.3)
    text = heard(hasty, block("print('begun')\nwhile True: pass")).text
    assert text == "\n```output\nbegun\nTimeoutError: stopped after 0.3 seconds\n```\n"


def test_a_long_output_keeps_its_start_and_its_end_within_the_tokens_allowed(task):
    text = heard(task, block("print('start', 'x' * 5000, 'end')")).text
    inner = text.removeprefix("\n```output\n").removesuffix("\n```\n")
    assert inner.startswith("start x") and inner.endswith("x end") and "\n...\n" in inner
    assert 110 <= len(PLAIN.encode(inner, add_special_tokens=False)) <= 120


def test_an_observation_says_whether_its_call_failed(task):
    turns = (block("1"), block("1 / 0"), "hm", "#### 1")
    assert [turn for turn in turns if heard(task, turn).failed] == [block("1 / 0")]
    hasty = make_tool(tool_seconds=0.3)
    assert heard(hasty, block("while True: pass")).failed


def test_after_the_last_turn_nothing_is_run_and_a_call_is_not_void(task, monkeypatch):
    monkeypatch.setattr(task, "_sandbox", None)  # Running code raises.
    assert heard(task, block("print(1)"), last=True) == Observation()
    assert heard(task, "hm", last=True) == Observation(void=True)
    assert heard(task, "#### 1", last=True) == Observation()


# A tool's output is not the model's answer -------------------------------------------------------------------


def test_code_that_prints_or_names_the_answer_has_not_answered(task):
    prompt = task.train[0]
    for code in (f"print('#### {prompt.answer}')", f"#### {prompt.answer}", f"'\\boxed{{{prompt.answer}}}'"):
        assert task.verify(prompt, block(code)) == 0.0
        assert heard(task, block(code)).text is not None
    assert task.verify(prompt, f"{block('x')}\n#### {prompt.answer}") == 1.0


def test_an_output_can_neither_end_its_block_nor_the_turn(task):
    code = "print('`' * 3)\nprint('<eos>', '<pad>')\nprint('`' * 5)"
    text = heard(task, block(code)).text
    inner = text.removeprefix("\n```output\n").removesuffix("\n```\n")
    assert "```" not in inner
    assert not {PLAIN.eos_token_id, PLAIN.pad_token_id} & set(PLAIN.encode(text, add_special_tokens=False))


def test_an_end_token_of_one_character_is_left_out_of_an_output():
    tokenizer = char_tokenizer()
    tokenizer.add_tokens(["§", "\n", AddedToken("¶", special=True)])
    text = make_tool(tokenizer).wrapped("a§b\nc¶<eos>")
    assert text == "\n```output\nab\nc< eos>\n```\n"


@given(st.text(st.sampled_from("`# p\n4<eos>")))
def test_prose_has_no_fence_left(text):
    assert "```" not in {line[:3] for line in without_code(text).split("\n")}


# Chat templates ----------------------------------------------------------------------------------------------


def test_between_two_turns_of_a_chat_stands_what_the_template_puts_there():
    tokenizer = char_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert between_turns(tokenizer) == ("\n[user]", "<eos>\n[assistant]")


def test_a_template_without_turns_is_refused():
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ConfigError, match="does not render a user's message"):
        between_turns(tokenizer)


def test_a_chat_models_output_is_a_users_message(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "2*3?", "answer": "6"}) + "\n")
    task = make_tool(CHAT, data=path, held_out=0)
    assert heard(task, block("print(6)")).text == "</user><user>```output\n6\n```</user><assistant>"


# Threads -----------------------------------------------------------------------------------------------------


def test_many_threads_may_observe_at_once(task):
    texts = {}

    def observe(number: int) -> None:
        texts[number] = heard(task, block(f"print({number}, 'x' * 500)")).text

    threads = [threading.Thread(target=observe, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(texts[n].startswith(f"\n```output\n{n} xxx") for n in range(8))


def test_an_answer_of_a_file_is_compared_by_value(from_file):
    prompt = next(p for p in from_file.train if p.answer == "1/2")
    assert from_file.verify(prompt, "\\boxed{0.5}") == 1.0
    assert from_file.verify(prompt, "#### 0.6") == 0.0
