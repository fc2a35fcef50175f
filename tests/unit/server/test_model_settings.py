"""The embedded engine serves a folder, or refuses it in words that name the file."""

import shutil
from pathlib import Path

import pytest

from megatron_rl.errors import CheckpointError
from megatron_rl.server.engine import Engine
from tests.cases.model_folders import SERVED, FolderCase
from tests.models import make_qwen3


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("sound"), tied=False, layers=1)


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_a_folder_is_served_or_refused_in_words(case: FolderCase, sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    case.change(folder)
    if case.refusal is None:
        assert Engine(folder).vocab_size > 0
        return
    with pytest.raises(CheckpointError, match=case.refusal) as caught:
        Engine(folder)
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 1000
