import re

import pytest

from megatron_rl.config import TaskConfig
from megatron_rl.errors import ConfigError
from megatron_rl.tasks import make_task
from tests.unit.tasks.char_tokenizer import char_tokenizer

TOKENIZER = char_tokenizer("0123456789+-=")


def running_total(seed: int = 0, max_prompt_tokens: int = 52, **keys):
    config = TaskConfig(name="running_total", **{"problems": 64, "held_out": 8, **keys})
    return make_task(config, TOKENIZER, seed=seed, max_prompt_tokens=max_prompt_tokens)


def test_every_step_of_a_solution_is_the_total_so_far():
    for prompt in running_total().train:
        solution = running_total_of(prompt.id)
        assert len(prompt.tokens) == len(prompt.text) == 52
        assert len(solution) == 50
        assert prompt.answer == solution[-2:] == f"{eval(prompt.id):02d}"


def running_total_of(problem: str) -> str:
    terms = [int(term) for term in re.findall(r"[+-]?\d", problem)]
    totals = [sum(terms[: k + 1]) for k in range(1, len(terms))]
    assert all(0 <= total < 100 for total in totals)
    return "".join(f"{total:02d}" for total in totals)


def test_the_solution_is_what_the_problem_says():
    task = running_total(terms=8)
    assert [task.solution(p) for p in task.held_out] == [running_total_of(p.id) for p in task.held_out]


def test_the_last_total_decides_the_reward():
    task = running_total()
    prompt = task.train[0]
    right = task.solution(prompt)
    wrong = f"{right[:-1]}{(int(right[-1]) + 1) % 10}"
    for response in [right, f" {right}<eos><pad>", f"99{right[2:]}"]:
        assert task.verify(prompt, response) == 1.0
    for response in ["", right[-1], wrong, f"{right}0", f"{right}<eos>0"]:
        assert task.verify(prompt, response) == 0.0


def texts(task) -> list[str]:
    return [prompt.text for prompt in [*task.held_out, *task.train]]


def test_the_problems_depend_on_the_seed_and_none_is_there_twice():
    assert len(set(texts(running_total(seed=3)))) == 64
    assert texts(running_total(seed=3)) == texts(running_total(seed=3))
    assert texts(running_total(seed=3))[0] != texts(running_total(seed=4))[0]
    assert len(running_total(seed=-1).held_out) == 8


def test_problems_that_cannot_be_used_are_refused():
    with pytest.raises(ConfigError, match=r"64 .* 64 .*lower the latter"):
        running_total(held_out=64)
    with pytest.raises(ConfigError, match=r"52 tokens.*raise rollout.max_prompt_tokens"):
        running_total(max_prompt_tokens=51)
