"""A reward of the user's own: what it is given, what it may return, and what happens when it fails."""

import asyncio
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rl.config import TaskConfig
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.tasks import make_task
from megatron_rl.tasks.limited_calls import Fault
from megatron_rl.tasks.make_reward import make_reward
from megatron_rl.tasks.reward import Response, Score, read_score
from megatron_rl.types import Prompt
from tests.unit.tasks.char_tokenizer import char_tokenizer

PROMPT = Prompt("p7", "1+1=", (4, 5), "2", metadata={"level": 3})
RESPONSES = [Response("2", (6,)), Response("3", (7, 8))]
TASK = make_task(TaskConfig(), char_tokenizer(), seed=0, max_prompt_tokens=16)


@pytest.fixture
def reward(tmp_path: Path):
    """A function that makes the reward of a file with this text, and closes it after the test."""
    made = []

    def make(text: str, name: str = "f", **keys):
        file = tmp_path / f"mine{len(made)}.py"
        file.write_text(text, encoding="utf-8")
        made.append(make_reward(TaskConfig(reward=f"{file}:{name}", **keys), TASK))
        return made[-1]

    yield make
    for one in made:
        one.close()


def values(scores: list[Score]) -> list[float]:
    return [score.value for score in scores]


def test_without_a_reward_the_verifier_of_the_task_is_called():
    assert values(make_reward(TaskConfig(), TASK).scores(PROMPT, RESPONSES)) == [1.0, 0.0]


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_function_gets_the_arguments_that_it_names(reward, kind):
    everything = reward(
        f"{kind} f(prompt, response, tokens, metadata, answer):\n"
        "    assert (prompt, answer, metadata) == ('1+1=', '2', {'level': 3})\n"
        "    return {'score': response == answer, 'length': len(tokens)}\n"
    )
    assert everything.scores(PROMPT, RESPONSES) == [Score(1.0, {"length": 1.0}), Score(0.0, {"length": 2.0})]
    assert values(reward(f"{kind} f(*, tokens): return sum(tokens)").scores(PROMPT, RESPONSES)) == [6.0, 15.0]
    assert reward(f"{kind} f(**rest): return len(rest)").scores(PROMPT, RESPONSES[:1]) == [Score(5.0)]


def test_a_chat_is_given_as_messages(reward):
    chat = Prompt("p", "hi", (1,), "", messages=({"role": "user", "content": "hi"},))
    text = "def f(prompt): return prompt == [{'role': 'user', 'content': 'hi'}]"
    assert values(reward(text).scores(chat, RESPONSES[:1])) == [1.0]


def test_an_object_that_can_be_called_is_a_function(reward):
    text = "class F:\n    async def __call__(self, response): return float(response)\nf = F()\n"
    assert values(reward(text).scores(PROMPT, RESPONSES)) == [2.0, 3.0]


@pytest.mark.parametrize("value", [1, 1.0, True, np.float32(1), np.int64(1), {"score": 1}])
def test_any_real_number_is_a_reward(value):
    assert read_score(value) == Score(1.0)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "returned None, a NoneType; a number or {'score': number} is expected"),
        ("1.0", "returned '1.0', a str"),
        ([1.0], "returned [1.0], a list"),
        (torch.tensor(1.0), "a Tensor"),
        (float("nan"), "returned 'score': nan, which is not finite"),
        (float("inf"), "not finite"),
        ({"value": 1.0}, "returned a dict without 'score': {'value': 1.0}"),
        ({"score": None}, "returned 'score': None, a NoneType"),
        ({"score": 1.0, "length": float("nan")}, "returned 'length': nan, which is not finite"),
        ({"score": 1.0, "length": "7"}, "returned 'length': '7', a str"),
        ({"score": 1.0, "mean": 7}, "returned the metric 'mean'; metrics need a name other than mean, std, errors"),
    ],
)
def test_anything_else_is_not(value, reason):
    read = read_score(value)
    assert isinstance(read, Fault) and reason in read.reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(response): return None", r"returned None, a NoneType"),
        ("def f(response): return float('nan')", r"which is not finite"),
        ("def f(response):\n    return 1 / 0", r"raised ZeroDivisionError: division by zero \(.*mine0.py:2\)"),
        ("async def f(response):\n    raise TimeoutError('mine')", r"raised TimeoutError: mine \(.*mine0.py:2\)"),
        ("import sys\ndef f(response): sys.exit(0)", r"raised SystemExit: 0 \(.*mine0.py:2\)"),
        ("import sys\nasync def f(response): sys.exit(0)", r"raised SystemExit: 0 \(.*mine0.py:2\)"),
    ],
)
def test_a_reward_that_fails_is_an_error_with_function_and_prompt_or_counts_as_zero(reward, text, message):
    with pytest.raises(
        UserError, match=rf"task.reward f \(.*mine0.py:[12]\) .*{message}.*, for a response to prompt 'p7'"
    ):
        reward(text).scores(PROMPT, RESPONSES)
    assert reward(text, reward_on_error="zero").scores(PROMPT, RESPONSES) == [Score(0.0, failed=True)] * 2


HANGS = {
    "thread": "import time\ndef f(response):\n    time.sleep(30 * (response == '2'))\n    return 1\n",
    "loop": "import asyncio\nasync def f(response):\n    await asyncio.sleep(30 * (response == '2'))\n    return 1\n",
}


@pytest.mark.parametrize("how", HANGS)
def test_a_reward_that_hangs_costs_its_own_response_alone(reward, how):
    started = time.monotonic()
    with pytest.raises(UserError, match=r"took longer than task.reward_timeout_s: 0.2, for a response to prompt 'p7'"):
        reward(HANGS[how], reward_timeout_s=0.2).scores(PROMPT, RESPONSES)
    lenient = reward(HANGS[how], reward_timeout_s=0.2, reward_on_error="zero")
    for _ in range(2):
        assert lenient.scores(PROMPT, [*RESPONSES, *RESPONSES]) == [Score(0.0, failed=True), Score(1.0)] * 2
    assert time.monotonic() - started < 10


def test_an_async_reward_that_blocks_its_loop_costs_the_group_and_not_the_next_one(reward):
    text = "import time\nasync def f(response):\n    time.sleep(3 * (response == '2'))\n    return 1\n"
    lenient = reward(text, reward_timeout_s=0.2, reward_on_error="zero")
    assert lenient.scores(PROMPT, RESPONSES) == [Score(0.0, failed=True)] * 2
    assert lenient.scores(PROMPT, RESPONSES[1:]) == [Score(1.0)]


def test_an_async_reward_runs_for_all_responses_of_a_group_and_for_all_groups_at_the_same_time(reward):
    slow = reward("import asyncio\nasync def f(response):\n    await asyncio.sleep(0.3)\n    return 1\n")
    started, scores = time.monotonic(), {}
    groups = [
        threading.Thread(target=lambda at=at: scores.update({at: slow.scores(PROMPT, RESPONSES * 8)}))
        for at in range(4)
    ]
    for group in groups:
        group.start()
    for group in groups:
        group.join()
    assert all(values(scores[at]) == [1.0] * 16 for at in range(4))
    assert time.monotonic() - started < 2.0  # 64 x 0.3 s one after the other


def test_a_task_of_the_users_own_has_the_same_limits(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from megatron_rl.tasks import ArithmeticTask\n\n\nclass Mine(ArithmeticTask):\n"
        "    def verify(self, prompt, response):\n        return 1 / (response == '2')\n"
    )
    config = TaskConfig(name=f"{file}:Mine")
    task = make_task(config, char_tokenizer(), seed=0, max_prompt_tokens=16)
    message = r"task.name Mine.verify \(.*mine.py:5\) raised ZeroDivisionError: .*mine.py:6\), for a response to prompt"
    with pytest.raises(UserError, match=message):
        make_reward(config, task).scores(PROMPT, RESPONSES)


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("def f(response): return 1", "g", r"has no 'g'; did you mean 'f'\?"),
        ("def f(response: return 1", "f", r"importing .*mine0.py:1 raised SyntaxError"),
        ("def f(response, weight): return 1", "f", r"f \(.*mine0.py:1\) requires the argument 'weight'"),
        ("f = 3", "f", r"task.reward f .* is a int; give a function"),
        ("class f:\n    def __init__(self, response): ...\n", "f", r"f \(.*mine0.py:1\) is a type; give a function"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_with_file_and_line(reward, text, name, message):
    with pytest.raises(ConfigError, match=message):
        reward(text, name)


def test_a_reward_starts_nothing_until_it_is_called(reward):
    before = threading.active_count()
    reward("async def f(response): return 1")
    reward("def f(response): return 1")
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="no running event loop"):
        asyncio.get_running_loop()


@pytest.mark.process
def test_a_call_that_never_returns_does_not_keep_the_process_alive():
    code = (
        "import time\n"
        "from megatron_rl.tasks.limited_calls import CallLoop, call_in_order\n"
        "async def block(): time.sleep(600)\n"
        "print(list(call_in_order([lambda: time.sleep(600)], 0.1)), CallLoop(0.1).call_together([block]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count("took longer than task.reward_timeout_s: 0.1") == 2
