"""The oldest and the newest megatron-core that are allowed read each other's checkpoints.

These tests run with the newest one (`make newest-core`), like the cases of tests/newest_core.txt.
"""

import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.parallel.core_versions import FOLDER, OldestRanks
from tests.parallel.test_checkpoint import close, same_bits

pytestmark = pytest.mark.skipif(
    str(FOLDER) not in sys.path, reason="needs the newest megatron-core: `make newest-core` installs it and runs this"
)
STEPS, VERSIONS = "tests.parallel.checkpoint_steps", "tests.parallel.core_versions"
LAYOUTS = [
    {"layout": {"tensor": 2}},
    {"layout": {"data": 2}, "optimizer": {"distributed": True}, "precision": {"train": "bf16"}},
]


@pytest.fixture(scope="module")
def oldest():
    group = OldestRanks(2)
    yield group
    group.close()


def test_the_two_groups_have_both_ends_of_what_is_allowed(oldest, two_ranks):
    pyproject = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())
    (allowed,) = (
        Requirement(line).specifier
        for line in pyproject["project"]["dependencies"]
        if Requirement(line).name == "megatron-core"
    )
    (old, _), (new, _) = oldest.run(VERSIONS, "version"), two_ranks.run(VERSIONS, "version")
    assert old in allowed and new in allowed and Version(old) < Version(new)


@pytest.mark.parametrize("arguments", LAYOUTS, ids=["tp2", "dp2_sharded_bf16"])
@pytest.mark.parametrize("newer", [True, False], ids=["from_old_to_new", "from_new_to_old"])
def test_a_run_goes_on_with_the_other_version(oldest, two_ranks, qwen3, tmp_path, newer, arguments):
    first, second = (oldest, two_ranks) if newer else (two_ranks, oldest)
    saved = first.run(STEPS, "save_and_go_on", model=qwen3, folder=tmp_path, **arguments)[0]
    loaded = second.run(STEPS, "load_and_go_on", model=qwen3, folder=tmp_path, **arguments)[0]
    assert same_bits(loaded["weights"], saved["weights"])
    assert close(loaded["next"]["weights"], saved["next"]["weights"]), "the optimizer's state was not carried over"
