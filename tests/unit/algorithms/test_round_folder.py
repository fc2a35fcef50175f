"""The files of a round are complete or absent, and a stage goes through its batch in epochs of whole groups."""

import json

import numpy as np
import pytest

from megatron_rl.algorithms.erpd.round import round_settings, with_new_names
from megatron_rl.algorithms.erpd.round_folder import RoundFolder
from megatron_rl.algorithms.erpd.stage import epoch_part
from megatron_rl.config import make_config
from megatron_rl.errors import CheckpointError
from megatron_rl.plan import plan_algorithm
from megatron_rl.sampling.batch import make_batch
from megatron_rl.types import Batch
from tests.trajectories import make_trajectory


def batch(groups: int = 5) -> Batch:
    made = [
        make_trajectory(2 * g + i, g, (5, 6), range(1 + g + i), float(i), prompt_id=f"p{g}")
        for g in range(groups)
        for i in range(2)
    ]
    return make_batch(made, "mean")


@pytest.fixture
def folder(tmp_path) -> RoundFolder:
    return RoundFolder(tmp_path / "erpd", 3)


def test_a_batch_is_read_back_as_it_was_sampled(folder):
    assert folder.read_batch() is None
    written = batch()
    sampling = {"sampled": {"truncated": 0.25}, "drawn": [5, [7]]}
    folder.write_batch(written, sampling)
    found, how = folder.read_batch()
    assert how == sampling and found.columns.keys() == written.columns.keys()
    for name in ("cu_seqlens", *written.columns):
        ours, theirs = getattr(found, name), getattr(written, name)
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


@pytest.mark.parametrize("size", [0, 10, 400])
def test_a_damaged_batch_is_refused_with_the_mend(folder, size):
    folder.write_batch(batch(), {})
    path = folder.path / "batch.npz"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"batch.npz is damaged .*remove .*step_000003"):
        folder.read_batch()


@pytest.mark.parametrize("content", [bytes(20), b"[" * 100_000, b"[1]", b'{"a": \xff}'], ids=len)
def test_a_damaged_note_or_record_is_refused_with_the_mend(folder, content):
    folder.add_note(a=1)
    (folder.path / "round.json").write_bytes(content)
    (folder.path / "teacher.jsonl").write_bytes(content + b"\n")
    with pytest.raises(CheckpointError, match=r"round.json is damaged .*remove .*step_000003"):
        folder.note()
    with pytest.raises(CheckpointError, match=r"teacher.jsonl is damaged .*remove .*step_000003"):
        folder.updates("teacher", 1)


def test_columns_and_notes_add_up(folder):
    assert folder.columns() == {} and folder.note() == {}
    folder.add_column("old", np.arange(3, dtype=np.float32))
    folder.add_column("teacher@5", np.zeros(3, dtype=np.float32))
    assert folder.columns()["old"].tolist() == [0, 1, 2] and folder.columns().keys() == {"old", "teacher@5"}
    folder.add_note(a=1)
    folder.add_note(b=[2])
    assert folder.note() == {"a": 1, "b": [2]}
    assert not list(folder.path.glob("*.partial"))


def test_what_was_measured_of_a_teacher_that_is_gone_is_forgotten_alone(folder):
    folder.forget_teacher()
    assert not folder.path.exists()
    for name in ("old", "teacher@5", "student@0", "teacher@50"):
        folder.add_column(name, np.zeros(3, dtype=np.float32))
    folder.add_note(digest={"rank 0": "a"}, teacher_rates={"eval/greedy": 0.5})
    folder.forget_teacher()
    assert folder.columns().keys() == {"old", "student@0"} and folder.note() == {"digest": {"rank 0": "a"}}


def test_an_update_that_cannot_be_logged_is_an_error_that_names_the_file(folder):
    (folder.path / "teacher.jsonl").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"step_000003/teacher\.jsonl cannot be written .*free space"):
        folder.add_update("teacher", {"loss": 0.5})


def settings(tree: dict) -> dict:
    base = {"model": {"path": "m"}, "objective": {"name": "erpd", "teacher": {"name": "erpd_mse", "kl_coef": 0.1}}}
    config = make_config({name: {**base.get(name, {}), **tree.get(name, {})} for name in {*base, *tree}})
    return round_settings(config, plan_algorithm(config).erpd)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optimizer", "lr", 0.5),
        ("optimizer", "weight_decay", 0.5),
        ("optimizer", "warmup_updates", 7),
        ("rollout", "temperature", 0.5),
        ("precision", "train", "bf16"),
        ("objective", "advantage", "grpo"),
        ("objective", "overlong_buffer", 2),
        ("objective", "teacher_updates", 60),
        ("objective", "student", {"clip_high": 0.3}),
        ("model", "path", "other"),
        ("model", "reference", "other"),
        ("run", "seed", 5),
    ],
)
def test_a_round_notes_each_setting_its_outcome_depends_on(section, key, value):
    before, after = settings({}), settings({section: {key: value}})
    assert [name for name in after if after[name] != before[name]] == [f"{section}.{key}"]
    assert json.loads(json.dumps(after)) == after, "it is compared with what a file holds"


def test_settings_that_a_round_does_not_depend_on_may_change():
    assert settings({"run": {"steps": 7, "save_every": 3}, "rollout": {"timeout_s": 5}}) == settings({})


def test_updates_after_the_resumed_one_and_a_line_cut_short_are_forgotten(folder):
    for loss in (0.5, 0.25, 0.125):
        folder.add_update("teacher", {"loss": loss})
    with (folder.path / "teacher.jsonl").open("ab") as file:
        file.write(b'{"loss": 0.')
    assert folder.updates("teacher", 3) == [{"loss": 0.5}, {"loss": 0.25}, {"loss": 0.125}]
    assert folder.updates("teacher", 2) == [{"loss": 0.5}, {"loss": 0.25}]
    folder.add_update("teacher", {"loss": 1.0})
    assert folder.updates("teacher", 3)[2] == {"loss": 1.0}
    with pytest.raises(CheckpointError, match="has 3 lines, but 4 updates are done"):
        folder.updates("teacher", 4)


def test_an_epoch_takes_every_group_once_and_whole_in_an_order_of_its_own():
    whole = batch(groups=7)
    epochs = [[epoch_part(whole, 3, 3 * epoch + at, (0, 1, 0)) for at in range(3)] for epoch in range(2)]
    for parts in epochs:
        assert sorted(np.concatenate([p.ids for p in parts]).tolist()) == whole.ids.tolist()
        for part in parts:
            assert (np.unique(part.groups, return_counts=True)[1] == 2).all()
    orders = [[p.groups.tolist() for p in parts] for parts in epochs]
    assert orders[0] != orders[1]
    assert epoch_part(whole, 3, 4, (0, 1, 0)).ids.tolist() == epochs[1][1].ids.tolist()
    assert orders[0] != [epoch_part(whole, 3, at, (0, 1, 1)).groups.tolist() for at in range(3)]


def test_a_round_noted_under_old_names_of_keys_has_the_same_settings():
    old = {
        "objective.teacher": {"name": "sapo", "denominator": "trainer_old"},
        "objective.student": {"kl": "k2", "level": "token"},
        "objective.signals": [{"denominator": "old"}],
        "optimizer.lr": 1e-3,
    }
    new = with_new_names(old)
    assert new["objective.teacher"] == {"name": "sapo", "ratio_denominator": "trainer_old"}
    assert new["objective.student"] == {"kl_estimator": "k2", "ratio_level": "token"}
    assert new["objective.signals"] == old["objective.signals"] and new["optimizer.lr"] == 1e-3
    assert new.keys() == old.keys() and with_new_names(new) == new
    assert old["objective.student"] == {"kl": "k2", "level": "token"}, "the note itself is unchanged"
