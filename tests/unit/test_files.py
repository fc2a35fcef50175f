"""JSON of files that may be damaged."""

import pytest

from megatron_rl.files import parse_json

DAMAGED = {
    "nothing": b"",
    "zeros": bytes(20),
    "half": b'{"a": ',
    "not UTF-8": b'{"a": "\xff"}',
    "5000 digits": b"9" * 5000,
    "lists in lists": b"[" * 100_000,
    "objects in objects": b'{"a":' * 100_000,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_whatever_is_wrong_with_a_json_text_is_a_value_error(content):
    with pytest.raises(ValueError, match=r"."):
        parse_json(content)


def test_a_json_text_is_read():
    assert parse_json(b'{"a": [1, null]}') == parse_json('{"a": [1, null]}') == {"a": [1, None]}
