"""Files that conductor and roles write for each other may be damaged by a crash or a full disk."""

from pathlib import Path

import pytest

from megatron_rl.launch.conductor.control_files import newest_checkpoint, read_json, read_json_lines
from megatron_rl.launch.conductor.probe import MARK, parse_facts
from megatron_rl.launch.conductor.run_preflight import read_text

DAMAGED = {
    "empty": b"",
    "zeros": bytes(64),
    "cut": b'{"code": 7',
    "a_list": b"[1]",
    "no_utf8": b'{"code": "\xff"}',
    "deep": b'{"code":' + b"[" * 100_000,
    "digits": b'{"code": ' + b"9" * 5000 + b"}",
}
LINES = ["cut", "no_utf8", "deep", "digits"]


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_read_as_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "result.json"
    assert read_json(str(path)) is None
    path.write_bytes(content)
    assert read_json(str(path)) is None


@pytest.mark.parametrize("content", [DAMAGED[name] for name in LINES], ids=LINES)
def test_a_damaged_line_is_left_out(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "starts.jsonl"
    path.write_bytes(b'{"start": 1}\n' + content + b'\n{"start": 2}\n{"start":')
    assert read_json_lines(str(path)) == [{"start": 1}, {"start": 2}]


def test_only_folders_that_are_numbered_are_checkpoints(tmp_path: Path) -> None:
    for name in ("step_000004", "step_\N{SUPERSCRIPT TWO}", "step_", "step_9.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "complete.json").write_text("{}")
    assert newest_checkpoint(str(tmp_path)) == 4


def test_the_output_of_probes_may_hold_any_bytes(tmp_path: Path) -> None:
    path = tmp_path / "probe.out"
    path.write_bytes(b"slurmstepd: \xff\xfe\n" + f'{MARK}{{"node": "n1"}}\n'.encode())
    assert parse_facts(read_text(str(path))) == [{"node": "n1"}]
