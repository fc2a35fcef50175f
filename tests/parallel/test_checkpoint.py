"""A checkpoint restores the state it was made from, under any layout. An incomplete checkpoint is never loaded."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from megatron_rl.policy.checkpoint_files import COMPLETE
from megatron_rl.policy.checkpoint_state import TrainState, newest_valid
from tests.parallel.group import RankGroup

STEPS = "tests.parallel.checkpoint_steps"
SHARDED = {"optimizer": {"distributed": True}}


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    assert a.keys() == b.keys() and a
    return all(np.array_equal(a[name], b[name]) for name in b)


def close(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.abs(a[name] - b[name]).max() <= 1e-5 * np.abs(b[name]).max() for name in b)


def round_trip(
    group: RankGroup, model: Path, folder: Path, saving: dict[str, Any], loading: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    saved = group.run(STEPS, "save_and_go_on", model=model, folder=folder, **saving)[0]
    return saved, group.run(STEPS, "load_and_go_on", model=model, folder=folder, **loading)[0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"layout": {"tensor": 2}},
        {"layout": {"pipeline": 2}},
        {"layout": {"pipeline": 2, "virtual_pipeline": 2}},
        {"layout": {"data": 2}},
        {"layout": {"data": 2}, **SHARDED},
        {"layout": {"tensor": 2}, "precision": {"train": "bf16"}},
        {"layout": {"data": 2}, "precision": {"train": "bf16"}, **SHARDED},
        {"layout": {"pipeline": 2}, "precision": {"train": "fp16"}},
        {"layout": {"data": 2}, "precision": {"train": "fp16"}, **SHARDED},
    ],
    ids=[
        "tp2",
        "pp2",
        "pp2_vpp2",
        "dp2",
        "dp2_sharded",
        "tp2_bf16",
        "dp2_sharded_bf16",
        "pp2_fp16",
        "dp2_sharded_fp16",
    ],
)
def test_loading_under_the_same_layout_continues_bit_for_bit(two_ranks, qwen3, tmp_path, arguments):
    saved, loaded = round_trip(two_ranks, qwen3, tmp_path, arguments, arguments)
    assert loaded["state"] == TrainState(step=2, version=3, updates=2, seed=9)
    assert same_bits(loaded["weights"], saved["weights"])
    assert not same_bits(loaded["next"]["weights"], loaded["weights"])
    assert same_bits(loaded["next"]["weights"], saved["next"]["weights"])
    assert np.array_equal(loaded["next"]["logp"], saved["next"]["logp"])
    assert (loaded["next"]["loss"], loaded["next"]["grad_norm"]) == (saved["next"]["loss"], saved["next"]["grad_norm"])
    assert np.array_equal(loaded["random"], saved["random"])


@pytest.mark.parametrize(
    "loading",
    [{"layout": {"pipeline": 2}}, {"layout": {"data": 2}}, {"layout": {"pipeline": 2, "virtual_pipeline": 2}}],
    ids=["pp2", "dp2", "pp2_vpp2"],
)
def test_a_tensor_parallel_checkpoint_loads_under_other_layouts(two_ranks, qwen3, tmp_path, loading):
    saved, loaded = round_trip(two_ranks, qwen3, tmp_path, {"layout": {"tensor": 2}}, loading)
    assert same_bits(loaded["weights"], saved["weights"])
    assert close(loaded["next"]["weights"], saved["next"]["weights"]), "the optimizer's state was not carried over"


def test_sharded_optimizer_state_loads_under_tensor_parallelism(two_ranks, qwen3, tmp_path):
    saving = {"layout": {"data": 2}, **SHARDED}
    saved, loaded = round_trip(two_ranks, qwen3, tmp_path, saving, {"layout": {"tensor": 2}, **SHARDED})
    assert same_bits(loaded["weights"], saved["weights"])
    assert close(loaded["next"]["weights"], saved["next"]["weights"])


def test_a_checkpoint_of_two_ranks_loads_on_four(two_ranks, four_ranks, qwen3, tmp_path):
    saved = two_ranks.run(STEPS, "save_and_go_on", model=qwen3, folder=tmp_path, layout={"tensor": 2})[0]
    layout = {"tensor": 2, "pipeline": 2}
    loaded = four_ranks.run(STEPS, "load_and_go_on", model=qwen3, folder=tmp_path, layout=layout)[0]
    assert same_bits(loaded["weights"], saved["weights"])
    assert close(loaded["next"]["weights"], saved["next"]["weights"])


def test_a_checkpoint_of_two_ranks_loads_on_one(two_ranks, qwen3, tmp_path):
    one_rank = RankGroup(1)
    try:
        for layout, sections in (({"tensor": 2}, {}), ({"data": 2}, SHARDED)):
            arguments = {"model": qwen3, "folder": tmp_path / next(iter(layout)), **sections}
            saved = two_ranks.run(STEPS, "save_and_go_on", **arguments, layout=layout)[0]
            loaded = one_rank.run(STEPS, "load_and_go_on", **arguments, layout={})[0]
            assert same_bits(loaded["weights"], saved["weights"])
            assert close(loaded["next"]["weights"], saved["next"]["weights"])
    finally:
        one_rank.close()


@pytest.mark.parametrize(
    "arguments", [{"layout": {"tensor": 2}}, {"layout": {"data": 2}, **SHARDED}], ids=["tp2", "dp2_sharded"]
)
def test_updates_made_while_files_are_written_are_not_in_them(two_ranks, qwen3, tmp_path, arguments):
    folder, gate = tmp_path / "checkpoints", tmp_path / "gate"
    saved = two_ranks.run(STEPS, "update_while_saving", model=qwen3, folder=folder, gate=gate, **arguments)[0]
    assert saved["names_while_writing"] == ["step_000001.partial"]
    loaded = two_ranks.run(STEPS, "load_and_go_on", model=qwen3, folder=folder, **arguments)[0]
    assert not same_bits(saved["after"], saved["weights"])
    assert same_bits(loaded["weights"], saved["weights"])
    assert same_bits(loaded["next"]["weights"], saved["next"]["weights"])


class Saved:
    """Three checkpoints, and the weights that each was made from."""

    def __init__(self, folder: Path, weights: list[dict[str, np.ndarray]]) -> None:
        self.folder, self.weights = folder, weights


@pytest.fixture(scope="module")
def three(two_ranks, qwen3, tmp_path_factory) -> Saved:
    folder = tmp_path_factory.mktemp("three")
    weights = two_ranks.run(
        STEPS, "save_each_update", model=qwen3, layout={"tensor": 2}, folder=folder, count=3, keep=3
    )[0]
    return Saved(folder, weights)


@pytest.fixture
def copied(three, tmp_path) -> Saved:
    return Saved(Path(shutil.copytree(three.folder, tmp_path / "copy")), three.weights)


def half_written(newest: Path) -> str:
    newest.rename(newest.with_name(newest.name + ".partial"))
    (newest.with_name(newest.name + ".partial") / COMPLETE).unlink()
    return f"step_000003.partial is not usable (half-written: no {COMPLETE})"


def with_a_truncated_file(newest: Path) -> None:
    file = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)


def test_a_half_written_checkpoint_is_passed_over_with_the_reason(two_ranks, qwen3, copied):
    reason = half_written(copied.folder / "step_000003")
    loaded = two_ranks.run(STEPS, "load_and_go_on", model=qwen3, layout={"tensor": 2}, folder=copied.folder)
    assert loaded[0]["said"].splitlines()[0] == f"checkpoint {reason}; trying an older one" and loaded[1]["said"] == ""
    assert [answer["state"].step for answer in loaded] == [2, 2]
    assert same_bits(loaded[0]["weights"], copied.weights[1])


def test_several_bad_checkpoints_are_passed_over_one_after_the_other(copied):
    with_a_truncated_file(copied.folder / "step_000003")
    (copied.folder / "step_000002" / COMPLETE).unlink()
    found, skipped = newest_valid(copied.folder)
    assert found == copied.folder / "step_000001"
    assert [name for name, _ in skipped] == ["step_000003", "step_000002"]


def test_no_usable_checkpoint_leaves_the_model_folder_s_weights(two_ranks, qwen3, copied):
    for folder in copied.folder.iterdir():
        (folder / COMPLETE).unlink()
    loaded = two_ranks.run(STEPS, "load_and_go_on", model=qwen3, layout={"tensor": 2}, folder=copied.folder)[0]
    assert loaded["state"] is None and loaded["said"].count("not usable") == 3
    assert same_bits(loaded["next"]["weights"], copied.weights[0])


def test_a_save_starts_no_process_that_stays_and_leaves_nothing_in_the_temporary_folder(two_ranks, qwen3, tmp_path):
    places = {"folder": tmp_path / "checkpoints", "temporary": tmp_path / "tmp"}
    places["temporary"].mkdir()
    for left in two_ranks.run(STEPS, "what_a_save_leaves", model=qwen3, layout={"tensor": 2}, **places):
        assert left == {"while writing": [], "children": 0, "after": []}


def test_every_byte_of_a_checkpoint_is_on_disk_before_its_list_says_so(two_ranks, qwen3, tmp_path):
    folder, record = tmp_path / "checkpoints", tmp_path / "record"
    two_ranks.run(STEPS, "syncs_of_a_save", model=qwen3, layout={"tensor": 2}, folder=folder, record=record)
    synced = [json.loads(line) for line in record.read_bytes().splitlines()]
    names = [name for name, _ in synced]
    listed = json.loads((folder / "step_000001" / COMPLETE).read_bytes())["files"]
    end = names.index(f"{COMPLETE}.partial")
    before = dict(synced[:end])
    assert {name: before.get(name) for name in listed} == listed
    assert names[end - 1 :] == ["step_000001.partial", f"{COMPLETE}.partial", "step_000001.partial", "checkpoints"]


def test_a_full_disk_is_one_line_on_every_rank_and_the_next_save_succeeds(two_ranks, qwen3, tmp_path):
    for message, everywhere, names in two_ranks.run(
        STEPS, "save_on_a_full_disk", model=qwen3, layout={"tensor": 2}, folder=tmp_path
    ):
        assert re.fullmatch(
            rf"checkpoint {tmp_path}/step_000001.partial cannot be written \(rank 0: File too large\): .*", message
        )
        assert everywhere and names == ["step_000002"]


def test_only_the_newest_checkpoints_are_kept(two_ranks, qwen3, tmp_path):
    two_ranks.run(STEPS, "save_each_update", model=qwen3, layout={"tensor": 2}, folder=tmp_path, count=4, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000003", "step_000004"]


def test_the_list_of_a_complete_checkpoint_names_every_file_its_size_and_its_digest(three):
    folder = three.folder / "step_000003"
    listed = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    there = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != COMPLETE}
    assert listed["files"] == {name: len(content) for name, content in there.items()}
    assert listed["xxh3_128"] == {name: xxhash.xxh3_128_hexdigest(content) for name, content in there.items()}
    assert len([name for name in there if name.endswith(".distcp")]) >= 2


def test_a_checkpoint_of_another_model_is_refused(two_ranks, qwen3_tied, copied):
    for message in two_ranks.run(STEPS, "refused_load", model=qwen3_tied, layout={"tensor": 2}, folder=copied.folder):
        assert "step_000003 cannot be loaded into this model and layout" in message and "output_layer.weight" in message


@pytest.mark.parametrize(
    "arguments",
    [
        {"layout": {"tensor": 2}},
        {"layout": {"data": 2}, **SHARDED},
        {"layout": {"tensor": 2}, "precision": {"train": "bf16"}},
        {"layout": {"data": 2}, "precision": {"train": "bf16"}, **SHARDED},
        {"layout": {"tensor": 2}, "precision": {"train": "fp16"}},
    ],
    ids=["tp2", "dp2_sharded", "tp2_bf16", "dp2_sharded_bf16", "tp2_fp16"],
)
def test_training_begins_again_from_a_named_checkpoint_as_it_did_the_first_time(two_ranks, qwen3, tmp_path, arguments):
    ours, other = two_ranks.run(STEPS, "start_again", model=qwen3, folder=tmp_path, **arguments)
    for way in ("again", "afresh"):
        assert all(same_bits(a, b) for a, b in zip(ours[way], ours["first"], strict=True))
    assert not same_bits(*ours["first"])
    at_zero, loaded, scored = ours["digests"]
    assert at_zero == loaded and len(at_zero) == 2 and all(at_zero[rank] != scored[rank] for rank in at_zero)
    assert ours["digests"] == other["digests"]
    assert same_bits(ours["second"], ours["first"][1]), "the weights of a checkpoint can be looked at alone"
    assert ours["names"] == ["step_000000", "step_000002", "step_000003"], "pinned ones stay besides the newest"
    assert ours["state"] == TrainState()
