"""Keys of previous versions are errors in a user's file, and are renamed in a run folder's own file."""

from pathlib import Path

import pytest

from megatron_rl.config import load_config
from megatron_rl.config.old_keys import RENAMED
from megatron_rl.errors import ConfigError

OLD = """\
model: {path: m}
rollout: {dynamic_sampling: 3}
objective: {name: erpd, teacher: {name: sapo, denominator: trainer_old}, student: {kl: k2, level: token}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(OLD, encoding="utf-8")
    return path


def test_an_old_key_is_an_error_that_names_the_new_one_and_its_line(file: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"config.yaml:2: key 'rollout.dynamic_sampling' is now called .*resampled_gr"
    ):
        load_config(file)


def test_an_old_key_of_an_override_is_an_error_too(tmp_path: Path) -> None:
    (tmp_path / "new.yaml").write_text("model: {path: m}")
    with pytest.raises(ConfigError, match=r"override 'objective.kl=k1': key 'objective.kl' is now .*'objective.kl_est"):
        load_config(tmp_path / "new.yaml", ["objective.kl=k1"])


def test_a_run_folders_own_file_is_read_with_its_keys_renamed(file: Path) -> None:
    config = load_config(file, accept_old_keys=True)
    assert config.rollout.max_resampled_groups == 3
    spec = config.objective.spec()
    assert spec["teacher"] == {"name": "sapo", "ratio_denominator": "trainer_old"}
    assert spec["student"] == {"kl_estimator": "k2", "ratio_level": "token"}


@pytest.mark.parametrize("old, new", [("paper_literal", "paper"), ("coef_reading", "conjecture")])
def test_an_old_name_of_a_preset_is_an_error_that_names_the_new_one(tmp_path: Path, old: str, new: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {{path: m}}\nobjective: {{name: erpd, teacher: {{name: drpo, delta: {old}}}}}\n")
    with pytest.raises(ConfigError, match=rf"config.yaml:2: 'objective.teacher.delta' is '{old}', .* called '{new}'"):
        load_config(file)
    with pytest.raises(ConfigError, match=rf"'objective.delta=.*'objective.delta' is '{old}', .* called '{new}'"):
        load_config(file, ["objective.teacher.delta=1.0", f"objective.delta={old}"])
    assert load_config(file, accept_old_keys=True).objective.spec()["teacher"]["delta"] == new


def test_no_new_key_is_an_old_one_of_the_same_section() -> None:
    for names in RENAMED.values():
        assert not names.keys() & set(names.values())
