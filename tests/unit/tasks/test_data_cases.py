"""The table of data: rows, chat templates and end-of-turn tokens are read, or refused in one paragraph."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken

from megatron_rl.config import TaskConfig
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.tasks import make_task, strip_end
from megatron_rl.tasks.end_tokens import decode_turns, stop_token_ids, turn_end_id
from megatron_rl.tasks.rows import read_rows
from megatron_rl.tasks.templates import between_turns, load_tokenizer
from tests.cases.data import CELLS, END_IDS, LINES, TEMPLATES, TYPED, Cell, Line, Template
from tests.unit.tasks.char_tokenizer import char_tokenizer

CHAT = char_tokenizer(chat=True)
GOOD = b'{"question": "1+1?", "answer": "2"}\n'


def math_task(data: Path, tokenizer=CHAT):
    config = TaskConfig(name="math", data=data, held_out=0)
    return make_task(config, tokenizer, seed=0, max_prompt_tokens=1000)


@pytest.mark.parametrize("case", LINES, ids=lambda case: case.name)
def test_a_line_that_cannot_be_used_is_refused_by_file_and_line(tmp_path, case: Line) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + case.line + b"\n")
    with pytest.raises(UserError, match=f"rows.jsonl:2: .*{case.message}") as error:
        math_task(path)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("case", CELLS, ids=lambda case: case.name)
def test_a_parquet_cell_that_cannot_be_used_is_refused_by_file_and_row(tmp_path, case: Cell) -> None:
    columns = {"question": pa.array(["1+1?", "1+2?"]), "answer": pa.array(["2", "3"])}
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({**columns, case.column: case.values}), path)
    with pytest.raises(UserError, match=f"rows.parquet:2: .*{case.message}"):
        math_task(path)


@pytest.mark.parametrize(("column", "truths"), TYPED, ids=lambda value: str(getattr(value, "type", "")))
def test_numbers_of_a_parquet_file_are_read_as_they_were_written(tmp_path, column, truths) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"question": ["a", "b"], "answer": column}), path)
    assert [prompt.answer for prompt in math_task(path).train] == truths
    nested = pa.table({"question": ["a", "b"], "reward_model": [{"truth": cell} for cell in column.to_pylist()]})
    kind = pa.struct([("truth", column.type)])
    pq.write_table(nested.set_column(1, "reward_model", nested["reward_model"].cast(kind)), path)
    config = TaskConfig(name="math", data=path, held_out=0, answer_column="reward_model.truth")
    assert [p.answer for p in make_task(config, CHAT, seed=0, max_prompt_tokens=99).train] == truths


def test_files_that_cannot_be_read_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no data file"):
        list(read_rows(tmp_path))
    with pytest.raises(UserError, match=r"cannot be read .*name too long"):
        list(read_rows(tmp_path / ("x" * 300)))
    (tmp_path / "rows.jsonl").write_bytes(GOOD)
    (tmp_path / "rows.jsonl").chmod(0)
    if os.geteuid() != 0:
        with pytest.raises(UserError, match=r"cannot be read .*Permission denied"):
            list(read_rows(tmp_path / "rows.jsonl"))


def test_a_line_of_50_mb_is_called_too_long_in_100_mb(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "' + b"x" * 50_000_000 + b'"}\n')
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    code = (
        "import resource, sys; from pathlib import Path; from megatron_rl.tasks.rows import read_rows\n"
        "kib = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = kib()\n"
        "try: list(read_rows(Path(sys.argv[1])))\n"
        "except Exception as error: print(type(error).__name__, kib() - before)"
    )
    told = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    name, grown = told.split()
    assert name == "UserError" and int(grown) < 100_000 and before >= 0


@pytest.mark.parametrize("case", TEMPLATES, ids=lambda case: case.name)
def test_no_prompt_is_made_without_its_question(tmp_path, case: Template) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"question": " say \\"hi\\" ", "answer": "2"}\n')
    tokenizer = char_tokenizer()
    tokenizer.chat_template = case.template
    if not case.message:
        (prompt,) = math_task(tmp_path / "rows.jsonl", tokenizer).train
        assert "h i" in tokenizer.decode(prompt.tokens)
        return
    with pytest.raises(ConfigError, match=f"the tokenizer's chat template .*{case.message}"):
        math_task(tmp_path / "rows.jsonl", tokenizer)


def test_a_template_that_takes_no_system_message_is_refused_by_file_and_line(tmp_path) -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    (tmp_path / "rows.jsonl").write_bytes(GOOD + json.dumps({"question": chat, "answer": "2"}).encode())
    with pytest.raises(ConfigError, match=r"rows.jsonl:2: .* leaves out message 1 \(role system\)"):
        math_task(tmp_path / "rows.jsonl", tokenizer)


def test_a_template_that_is_broken_in_a_folder_is_named_by_its_file(tmp_path) -> None:
    CHAT.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    (tmp_path / "rows.jsonl").write_bytes(GOOD)
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: .*chat_template.jinja.*no"):
        math_task(tmp_path / "rows.jsonl", load_tokenizer(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"model.path .* the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


# End-of-turn tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "message"), END_IDS, ids=str)
def test_an_end_id_that_is_none_is_refused(tmp_path, value, message) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ConfigError, match=message):
        stop_token_ids(tmp_path)


@pytest.fixture
def loaded(tmp_path):
    """A tokenizer of a folder whose generation settings name a second end, which is not marked special."""
    tokenizer = char_tokenizer(chat=True)
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=False), AddedToken("<think>", special=True)])
    tokenizer.save_pretrained(tmp_path)
    ids = [1, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return load_tokenizer(tmp_path)


def test_every_end_token_of_the_model_is_taken_off_a_response(loaded) -> None:
    assert strip_end(loaded, "a <|im_end|>") == "a"
    assert strip_end(loaded, "a<eos><|im_end|> <pad>") == "a"
    assert strip_end(loaded, "a <|other|>") == "a <|other|>"


def test_a_decoded_turn_has_neither_end_nor_special_tokens_but_the_tags_of_thoughts(loaded, tmp_path) -> None:
    turns = [np.array(loaded.encode(text)) for text in ("#<|im_end|>", "a<eos><pad>", "<think>5<|im_end|>")]
    assert decode_turns(loaded, turns, stop_token_ids(tmp_path)) == ["#", "a", "<think> 5"]
    assert decode_turns(loaded, turns[:1], ()) == ["# <|im_end|>"]


def test_demonstrations_end_with_the_token_of_the_tokenizer_where_sampling_stops_at_it(loaded, tmp_path) -> None:
    assert turn_end_id(tmp_path, loaded) == 1
    loaded.eos_token = "<|im_end|>"
    assert turn_end_id(tmp_path, loaded) == loaded.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("end", ["<|im_end|>", " <|im_end|>", "<eos>"])
def test_the_frame_between_turns_does_not_repeat_the_end_that_the_model_has_written(loaded, end: str) -> None:
    loaded.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}" + end + "\n{% endfor %}[go]"
    assert between_turns(loaded) == ("\n[user]", f"{end}\n[go]")
