"""A checkpoint counts as complete only if all its files are complete and its folder has its final name."""

from pathlib import Path

from megatron_rl.policy.checkpoint_files import NEEDED
from megatron_rl.policy.checkpoint_state import newest_valid
from tests.cases.checkpoints import listed_again


def checkpoint(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir()
    for needed in (*NEEDED, "part"):
        (path / needed).write_bytes(b"12345")
    listed_again(path)
    return path


def test_a_checkpoint_that_was_not_renamed_yet_is_passed_over_even_when_its_files_are_whole(tmp_path):
    older = checkpoint(tmp_path, "step_000002")
    checkpoint(tmp_path, "step_000003.partial")
    assert newest_valid(tmp_path) == (older, [("step_000003.partial", "half-written: it was not renamed any more")])


def test_a_folder_with_nothing_but_an_unfinished_checkpoint_holds_none(tmp_path):
    checkpoint(tmp_path, "step_000000.partial")
    assert newest_valid(tmp_path)[0] is None
