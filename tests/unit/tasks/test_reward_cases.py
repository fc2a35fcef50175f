"""The table of rewards: each response is paid or refused, and each ground truth read or refused, as it says."""

import json
import time
from types import SimpleNamespace

import pytest

from megatron_rl.config import TaskConfig
from megatron_rl.errors import UserError
from megatron_rl.tasks import make_task
from megatron_rl.tasks.answers import read_answer, same_answer
from megatron_rl.tasks.final_answer import ground_truth, response_answer
from tests.cases.rewards import KINDS, REFUSED, REWARDS, Refused, Reward
from tests.unit.tasks.char_tokenizer import char_tokenizer

TOKENIZER = char_tokenizer()


def task_of(path, *cells: str):
    path.write_text("".join(f'{{"question": "q", "answer": {cell}}}\n' for cell in cells))
    config = TaskConfig(name="math", data=path, held_out=0)
    return make_task(config, TOKENIZER, seed=0, max_prompt_tokens=100)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    task = task_of(tmp_path_factory.mktemp("data") / "rows.jsonl", *(json.dumps(case.truth) for case in REWARDS))
    yield task
    task.close()


@pytest.mark.parametrize(("at", "case"), list(enumerate(REWARDS)), ids=lambda value: str(value)[:60])
def test_a_response_is_paid_if_its_answer_equals_the_ground_truth(task, at: int, case: Reward) -> None:
    prompt = task.train[at]
    assert task.verify(prompt, case.response) == float(case.right)
    assert task.verify(prompt, task.solution(prompt)) == 1.0


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.cell[:20])
def test_a_ground_truth_that_no_response_could_equal_is_refused_by_file_and_line(tmp_path, case: Refused) -> None:
    with pytest.raises(UserError, match=f"rows.jsonl:2: .*{case.message}"):
        task_of(tmp_path / "rows.jsonl", '"2"', case.cell)


def test_the_ground_truths_are_counted_by_kind(tmp_path) -> None:
    cells = [json.dumps(cell) for cell in (*KINDS, "either \\boxed{3} cases or no, so \\boxed{4}")]
    task = task_of(tmp_path / "rows.jsonl", *cells)
    assert {cell: read_answer(prompt.answer).kind for cell, prompt in zip(KINDS, task.train, strict=False)} == KINDS
    assert task.summary == (
        f"{tmp_path}/rows.jsonl: 18 ground truths (number 6, formula 6, text 3, choice 2, word 1); "
        "1 have several boxes, of which the last counts"
    )


def test_numbers_words_and_choices_are_compared_without_the_grader() -> None:
    # A backslash, a factorial and a division may be formulas.
    plain = [
        case for case in REWARDS if isinstance(case.truth, str) and not set("\\!/") & set(case.truth + case.response)
    ]
    untouchable = SimpleNamespace()  # has no `equal`
    seen = 0
    for case in plain:
        truth = read_answer(ground_truth(case.truth) or "")
        answer = response_answer(case.response, truth=case.truth)
        if answer is not None and truth.kind in ("number", "choice", "word", "text"):
            assert case.right == same_answer(truth, answer, untouchable)
            seen += 1
    assert seen > 70


def test_a_prompt_that_opens_a_thought_has_no_answer_before_the_thought_ends(tmp_path) -> None:
    tokenizer = char_tokenizer(chat=True)
    tokenizer.chat_template += "<think>\n"
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "2+3?", "answer": "5"}\n')
    config = TaskConfig(name="math", data=path, held_out=0)
    task = make_task(config, tokenizer, seed=0, max_prompt_tokens=100)
    assert task.verify(task.train[0], "maybe \\boxed{5}, let me") == 0.0
    assert task.verify(task.train[0], "maybe \\boxed{6}</think> \\boxed{5}") == 1.0
    assert task.verify(task.train[0], task.solution(task.train[0])) == 1.0


PARTS = ["\\boxed{", "\\boxed{5} ", "####", "#### 5\n", "<think>", "</think>", "a", "a ", "5 ", "1,", "*", "_a", "`"]
PARTS += ["{", "\\text{", "=", "a=", "\\frac{1}{", " ", "$", "\\boxed{5}" + " " * 500, "#### answer" + " " * 500, "x^"]


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_a_response_of_one_part_repeated_is_judged_in_time(part: str) -> None:
    never = SimpleNamespace(equal=lambda gold, answer: False)
    begun = time.perf_counter()
    for whole in (part * (50_000 // len(part)), f"#### {part * (1900 // len(part))}1 = 5"):
        answer = response_answer(whole)
        for truth in ("5", "\\sqrt{2}", "word"):
            same_answer(read_answer(truth), answer or "", never)
    assert time.perf_counter() - begun < 3
