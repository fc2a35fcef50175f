import json
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_rl.config import TaskConfig
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.tasks import make_task
from megatron_rl.tasks.grader import Grader
from megatron_rl.tasks.math import ground_truth, response_answer
from megatron_rl.types import Prompt
from tests.unit.tasks.char_tokenizer import char_tokenizer

EXCERPT = Path(__file__).parents[2] / "data" / "math_excerpt.jsonl"
PLAIN, CHAT = char_tokenizer(), char_tokenizer(chat=True)


def math_task(data: Path, *, tokenizer=PLAIN, max_prompt_tokens=1000, **keys):
    keys = {"held_out": 0, **keys}
    return make_task(TaskConfig(name="math", data=data, **keys), tokenizer, seed=0, max_prompt_tokens=max_prompt_tokens)


def jsonl(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def task():
    task = math_task(EXCERPT, held_out=5)
    yield task
    task.close()


def problem(answer: str) -> Prompt:
    return Prompt(id="p", text="", tokens=(), answer=answer)


def test_the_last_rows_are_held_out_and_no_row_is_lost(task):
    assert (len(task.train), len(task.held_out)) == (15, 5)
    assert [p.id for p in [*task.train, *task.held_out]] == [f"math_excerpt.jsonl:{n}" for n in range(1, 21)]
    assert task.train[0].answer == "228"


def test_the_rows_of_an_eval_file_are_held_out_instead(tmp_path):
    other = jsonl(tmp_path / "eval.jsonl", {"question": "1+1?", "answer": "2"})
    task = math_task(EXCERPT, eval_data=other, held_out=5)
    assert (len(task.train), [p.id for p in task.held_out]) == (20, ["eval.jsonl:1"])


def test_every_row_of_the_excerpt_verifies_its_own_answer_and_refuses_another(task):
    for prompt in [*task.train, *task.held_out]:
        assert task.verify(prompt, task.solution(prompt)) == 1.0
        assert task.verify(prompt, f"so it is \\boxed{{{prompt.answer}}}.<eos>") == 1.0
        assert task.verify(prompt, f"#### {prompt.answer}7") == 0.0
        assert task.verify(prompt, f"it is {prompt.answer}") == 0.0


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        ("1050", "#### 1,050", 1.0),
        ("1050", "#### $1050.", 1.0),
        ("1/2", "\\boxed{\\frac{1}{2}}", 1.0),
        ("0.5", "\\boxed{\\frac{1}{2}}", 1.0),
        ("x+1", "\\boxed{1+x}", 1.0),
        ("72", "#### 71\n#### 72", 1.0),
        ("72", "\\boxed{72} no, #### 71", 0.0),
        ("72", "#### 71, no: \\boxed{72}", 1.0),
        ("72", "\\boxed{72", 0.0),
        ("72", "####", 0.0),
        ("72", "", 0.0),
        ("72", "\\boxed{}", 0.0),
        ("72", "\\boxed{\\frac{}{}} }}{{ \\boxed{\\sqrt[}", 0.0),
        ("72", "#### \ud83d \x00", 0.0),
        ("-7", "#### 7", 0.0),
    ],
)
def test_responses_are_judged_by_their_last_answer(task, answer, response, reward):
    assert task.verify(problem(answer), response) == reward


def test_verification_works_outside_the_main_thread(task):
    rewards = [None] * 4

    def judge(at: int) -> None:
        rewards[at] = task.verify(problem("1/2"), "\\boxed{0.5}" if at % 2 else "\\boxed{0.6}")

    threads = [threading.Thread(target=judge, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rewards == [0.0, 1.0, 0.0, 1.0]


def test_an_answer_that_takes_too_long_is_wrong_and_the_next_one_is_still_judged():
    grader = Grader(limit_s=2.0)
    assert grader.equal("1/2", "0.5")
    assert not grader.equal("9", "9^{9^{9^{9}}}")
    assert grader.equal("1/2", "0.5")
    grader.close()


def test_a_grader_whose_process_died_starts_another():
    grader = Grader()
    assert grader.equal("1/2", "0.5")
    grader._alive[0].kill()
    grader._alive[0].wait()
    assert grader.equal("1/2", "0.5")
    grader.close()


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("a #### b\n#### 7", "7"),
        ("so \\boxed{1}, rather \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        (" 42 ", "42"),
        ("\\boxed{1} #### 2", "2"),
    ],
)
def test_the_ground_truth_is_after_the_mark_or_in_the_last_box_or_the_whole(text, truth):
    assert ground_truth(text) == truth


def test_a_response_without_a_marked_answer_has_none():
    assert response_answer("it is 42") is None


def test_the_prompt_goes_through_the_chat_template_when_there_is_one():
    with_template = math_task(EXCERPT, tokenizer=CHAT).train[0]
    without = math_task(EXCERPT).train[0]
    assert "".join(CHAT.convert_ids_to_tokens(with_template.tokens)) == f"<user>{with_template.text}</user><assistant>"
    assert "".join(PLAIN.convert_ids_to_tokens(without.tokens)) == f"{without.text}\n"


def test_parquet_and_other_column_names_are_read_alike(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["2+2?", "3+3?"], "solution": [4, 6]}), path)
    task = math_task(path, prompt_column="prompt", answer_column="solution")
    assert [(p.id, p.text, p.answer) for p in task.train] == [
        ("rows.parquet:1", "2+2?", "4"),
        ("rows.parquet:2", "3+3?", "6"),
    ]


GOOD = {"question": "1+1?", "answer": "2"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"question": "1+', r"rows.jsonl:2: not a JSON object"),
        ("[1]", r"rows.jsonl:2: a JSON object is expected, found list"),
        ({"question": "1+1?"}, r"rows.jsonl:2: 'answer' is missing \(columns here: question\); set task.answer_column"),
        ({"prompt": "1+1?", "answer": "2"}, r"rows.jsonl:2: 'question' is missing .*set task.prompt_column"),
        ({"question": None, "answer": "2"}, r"rows.jsonl:2: 'question' is None"),
        ({"question": "1+1?", "answer": "two ####"}, r"rows.jsonl:2: 'answer' holds no final answer"),
    ],
)
def test_a_malformed_row_is_refused_by_file_and_line(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        math_task(jsonl(tmp_path / "rows.jsonl", GOOD, row))


def test_bytes_that_are_no_text_are_refused_by_file_and_line(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", GOOD)
    path.write_bytes(path.read_bytes() + b'{"question": "\xff"}\n')
    with pytest.raises(UserError, match=r"rows.jsonl:2: not a JSON object"):
        math_task(path)


def test_a_parquet_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(UserError, match=r"rows.parquet is not a readable parquet file"):
        math_task(tmp_path / "rows.parquet")


def test_prompts_over_the_limit_are_counted_and_the_first_is_named(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", GOOD, {**GOOD, "question": "x" * 30}, {**GOOD, "question": "x" * 40})
    with pytest.raises(
        UserError, match=r"rows.jsonl:2: the prompt has 31 tokens.*is 20; 2 of 3 .*max_prompt_tokens to 41"
    ):
        math_task(path, max_prompt_tokens=20)


def test_missing_empty_and_too_short_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no data file"):
        math_task(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="no rows"):
        math_task(jsonl(tmp_path / "rows.jsonl"))
    with pytest.raises(ConfigError, match=r"task\.held_out"):
        math_task(jsonl(tmp_path / "rows.jsonl", GOOD), held_out=1)


VERL = {
    "data_source": "gsm8k",
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}],
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"index": 7, "split": "train"},
}


def written(tmp_path: Path, kind: str, *rows) -> Path:
    if kind == "jsonl":
        return jsonl(tmp_path / "rows.jsonl", *rows)
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_in_the_layout_of_verl_is_read_as_is(tmp_path, kind):
    path = written(tmp_path, kind, VERL)
    columns = {"prompt_column": "prompt", "answer_column": "reward_model.ground_truth"}
    (prompt,) = math_task(path, tokenizer=CHAT, **columns).train
    assert CHAT.decode(prompt.tokens).replace(" ", "") == "<user>Bebrief.</user><user>1+1?</user><assistant>"
    assert prompt.answer == "2" and prompt.text == "1+1?" and list(prompt.messages) == VERL["prompt"]
    assert dict(prompt.metadata) == {name: value for name, value in VERL.items() if name != "prompt"}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_in_the_layout_of_trl_is_read_as_is_and_needs_no_answer_with_a_reward(tmp_path, kind):
    path = written(tmp_path, kind, {"prompt": "1+1?", "solution": "2", "level": 3})
    (prompt,) = math_task(path, prompt_column="prompt", reward="mine.py:f").train
    assert (prompt.text, prompt.answer, prompt.messages) == ("1+1?", "", ())
    assert dict(prompt.metadata) == {"solution": "2", "level": 3}
    with pytest.raises(UserError, match=r"prompt 'rows.\w+:1' has no answer"):
        math_task(path, prompt_column="prompt", reward="mine.py:f").solution(prompt)
    with pytest.raises(UserError, match=r"rows.\w+:1: 'answer' is missing"):
        math_task(path, prompt_column="prompt")


def test_a_column_with_a_dot_in_its_name_comes_before_a_path(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", {"question": "q", "a.b": "1", "a": {"b": "2"}})
    assert math_task(path, answer_column="a.b").train[0].answer == "1"


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "'question' must end with a message of the user"),
        ([{"role": "assistant", "content": "2"}], "'question' must end with a message of the user"),
        ([{"role": "user"}], "message 1 of 'question' is .* it needs texts role and content"),
        ([{"role": "user", "content": ["1"]}], "message 1 of 'question'"),
        ({"role": "user", "content": "1"}, ".* text or chat messages are expected"),
    ],
)
def test_malformed_messages_are_errors_with_file_and_line(tmp_path, messages, error):
    path = jsonl(tmp_path / "rows.jsonl", {"question": messages, "answer": "2"})
    with pytest.raises(UserError, match=f"rows.jsonl:1: {error}"):
        math_task(path, tokenizer=CHAT)


def test_messages_need_a_chat_template(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", {"question": VERL["prompt"], "answer": "2"})
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: the prompt is chat messages, .* has no chat template"):
        math_task(path)
