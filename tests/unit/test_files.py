"""JSON of files that may be damaged, and large files."""

import errno
import resource
import signal
from pathlib import Path

import numpy as np
import pytest

from megatron_rl.files import LargeFile, create_large_file, parse_json

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


def test_a_large_file_holds_what_was_written_in_whatever_sizes(tmp_path: Path):
    contents = [b"head", bytes(3 * LargeFile.PIECE + 5), np.arange(1 << 18, dtype=np.int32).data, b"", b"tail"]
    with create_large_file(tmp_path / "file") as file:
        assert [file.write(content) for content in contents] == [memoryview(one).nbytes for one in contents]
        assert file.tell() == sum(memoryview(one).nbytes for one in contents)
    assert (tmp_path / "file").read_bytes() == b"".join(bytes(one) for one in contents)
    with LargeFile(tmp_path / "raw", "w") as raw:
        assert raw.write(np.zeros((0, 3))) == 0


def test_a_large_file_that_does_not_fit_is_an_error(tmp_path: Path):
    """A limit of the process stands for a full disk: both end a write in the middle of the content."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LargeFile.PIECE + 100, hard))
    try:
        with LargeFile(tmp_path / "file", "w") as file, pytest.raises(OSError, match="File too large") as error:
            file.write(bytes(3 * LargeFile.PIECE))
        assert error.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "file").stat().st_size == LargeFile.PIECE + 100
