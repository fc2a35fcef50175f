"""Data files, chat templates and end-of-turn tokens that must be read, or refused in one paragraph with their place."""

from decimal import Decimal
from typing import Any, NamedTuple

import pyarrow as pa

JSON_NUMBERS = "https://docs.python.org/3/library/stdtypes.html#int-max-str-digits"
TEMPLATES_RAISE = "https://github.com/EleutherAI/lm-evaluation-harness/issues/2109"
TEMPLATES_DROP = "https://github.com/NVIDIA-NeMo/RL/issues/1574"
STOPS = "https://github.com/huggingface/trl/pull/7039"
SMALL = "https://github.com/usds/justice40-tool/pull/952"


class Line(NamedTuple):
    """The second line of a JSONL file, and what its message says after file and line."""

    name: str
    line: bytes
    message: str
    report: str = ""


LINES = [
    Line("cut", b'{"question": "1+', "not a JSON object"),
    Line("list", b"[1]", "a JSON object is expected, found list"),
    Line("number", b"7", "a JSON object is expected, found int"),
    Line("latin-1", b'{"question": "\xff", "answer": "2"}', "not a JSON object"),
    Line("half a pair", b'{"question": "a\\ud800b", "answer": "2"}', "'question' holds half of a surrogate pair .* 2"),
    Line("half a pair in the answer", b'{"question": "a", "answer": "\\udc00"}', "'answer' holds half of a surrogate"),
    Line(
        "half a pair in a message",
        b'{"question": [{"role": "user", "content": "\\ud83d"}], "answer": "2"}',
        "'question' holds half of a surrogate",
    ),
    Line("deep", b'{"question": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "the JSON is nested too deep"),
    Line("deep objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "the JSON is nested too deep"),
    Line("5000 digits", b'{"question": "q", "answer": ' + b"7" * 5000 + b"}", "not a JSON object", JSON_NUMBERS),
    Line("too long", b'{"question": "' + b"x" * (17 << 20) + b'"}', "the line is longer than 16 MiB"),
    Line(
        "long text", b'{"question": "' + b"x" * (1 << 20) + b'", "answer": "2"}', "has 1,048,576 characters, which can"
    ),
    Line("no answer", b'{"question": "q"}', "'answer' is missing"),
    Line("no question", b'{"prompt": "q", "answer": "2"}', "'question' is missing .*set task.prompt_column"),
    Line("null", b'{"question": null, "answer": "2"}', "'question' is None"),
    Line("blank", b'{"question": " ", "answer": "2"}', "'question' is ' '; text or chat messages are expected"),
    Line("long value", b'{"question": {"a": "' + b"x" * 5000 + b'"}, "answer": "2"}', "'question' is .{1,150};"),
    Line("empty message", b'{"question": [{"role": "user", "content": " "}], "answer": "2"}', "asks nothing"),
]


class Cell(NamedTuple):
    """A cell of a parquet file beside `question` and `answer`, and what its message says."""

    name: str
    column: str
    values: Any
    message: str


def _broken_text() -> pa.Array:
    """Return a text column whose second cell is not UTF-8, as Arrow stores it without a check."""
    raw = pa.array([b"2", b"\xff\xfe"], pa.binary())
    return pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])


CELLS = [
    Cell("broken UTF-8", "answer", _broken_text(), "'answer' holds a string that cannot be read"),
    Cell("late date", "day", pa.array([0, 2**31 - 1], pa.date32()), r"'day' holds a date32\[day\] that cannot be read"),
    Cell(
        "late time", "at", pa.array([0, 2**62], pa.timestamp("ms")), r"'at' holds a timestamp\[ms\] that cannot be read"
    ),
    Cell("not a number", "answer", pa.array([2.0, float("nan")]), "'answer' is nan, which is no number"),
]

# Parquet columns of answers, and the ground truths that they hold.
TYPED = [
    (pa.array([0.1, 72.5], pa.float32()), ["0.1", "72.5"]),
    (pa.array([0.00005, 1e16]), ["0.00005", "10000000000000000"]),
    (pa.array([4, 6]), ["4", "6"]),
    (pa.array([Decimal("0.25"), Decimal("2")], pa.decimal128(10, 2)), ["0.25", "2.00"]),
]


class Template(NamedTuple):
    """A chat template, and what its message says; "" for one that is used."""

    name: str
    template: str
    message: str
    report: str = ""


TEMPLATES = [
    Template("raises", "{{ raise_exception('A system message is required') }}", "A system message", TEMPLATES_RAISE),
    Template("not Jinja", "{% for m in messages %}{{ m['content'] }", "TemplateSyntaxError", TEMPLATES_RAISE),
    Template("unknown variable", "{{ messages[0]['content'] }}{{ date.year }}", "'date' is undefined", TEMPLATES_RAISE),
    Template("unknown filter", "{{ messages | tojsonl }}", "No filter named 'tojsonl'"),
    Template("wrong type", "{{ messages[0]['content'] + 1 }}", "TypeError"),
    Template("endless", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    Template("nothing", "{% if false %}{{ messages }}{% endif %}", "renders nothing"),
    Template("blank", " \n", "renders nothing"),
    Template("drops the question", "<user></user><assistant>", "leaves out message 1", TEMPLATES_DROP),
    Template("cuts the question", "{{ messages[0]['content'][:3] }}", "leaves out message 1"),
    Template("trims", "<user>{{ messages[0]['content'] | trim }}</user>", ""),
    Template("writes JSON", "<user>{{ messages[0] | tojson }}</user>", ""),
]

# Values of eos_token_id in generation_config.json, and what the message says.
END_IDS = [
    ("</s>", "eos_token_id is '</s>'; give the id of a token"),
    ([2, "</s>"], "eos_token_id is .*give the id of a token"),
    (-1, "eos_token_id is -1"),
    (True, "eos_token_id is True"),
    (2.5, "eos_token_id is 2.5"),
    ({"a": 1}, "eos_token_id is {'a': 1}"),
    (None, "names no eos_token_id"),
    ([], "names no eos_token_id"),
]
