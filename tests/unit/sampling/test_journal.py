"""Finished groups are read from disk as they were written; damaged records and other groups are not."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_rl.errors import CheckpointError
from megatron_rl.sampling.group import Group
from megatron_rl.sampling.journal import GroupJournal
from megatron_rl.sampling.trajectory_builder import ToolUse
from megatron_rl.types import Trajectory
from tests.trajectories import make_trajectory


def group(
    number: int, version: int = 1, seed: int = 0, *, topk: bool = False, routed: bool = False, masked: bool = True
) -> Group:
    rng = np.random.default_rng((number, seed))
    rows = []
    for k in range(3):
        size = int(rng.integers(1, 6))
        likeliest = {"topk_ids": rng.integers(0, 9, (size, 2)), "topk_logmu": -rng.random((size, 2))}
        rows.append(
            make_trajectory(
                3 * number + k,
                number,
                (5, 6, 7),
                rng.integers(0, 2**31 - 1, size),
                float(rng.random()),
                prompt_id="päth/7",
                reason=("stop", "length")[k % 2],
                logmu=-rng.random(size),
                versions=[version, *[version + 1] * (size - 1)],
                mask=[1] + [0] * (size - 1) if masked and k == 1 else [1] * size,
                routing=rng.integers(0, 4, (size + 2, 2, 1), dtype=np.int32) if routed else None,
                **(likeliest if topk else {}),
            )
        )
    metrics = ({"length": 0.1 + number}, {}, {"päth": -1e-300}) if masked else ()
    return Group(
        rows,
        resumed=number,
        retractions=2,
        tool_use=ToolUse(5, number, 3),
        reward_metrics=metrics,
        reward_errors=number,
    )


def plain(one: Group) -> tuple:
    """Return a group as plain numbers, which can be compared, with the dtypes of its arrays."""

    def row(t: Trajectory) -> tuple:
        arrays = {**t.columns, "prompt": t.prompt_tokens, "routing": np.zeros(0) if t.routing is None else t.routing}
        listed = {name: (array.dtype.name, array.tolist()) for name, array in sorted(arrays.items())}
        return (t.id, t.group, t.prompt_id, t.finish_reason, t.reward, listed)

    counts = (one.resumed, one.retractions, one.tool_use, one.reward_metrics, one.reward_errors)
    return ([row(t) for t in one.trajectories], *counts)


def everything(buffer: GroupJournal) -> dict[int, Group]:
    return buffer.recover(lambda _: True)[0]


@pytest.mark.parametrize(("topk", "routed"), [(False, False), (True, True)])
def test_groups_come_back_as_they_were(tmp_path, topk, routed) -> None:
    written = [group(number, topk=topk, routed=routed) for number in range(4)]
    buffer = GroupJournal(tmp_path / "new", "asked")
    for at, one in enumerate(written):
        buffer.append(at // 3, one)
    found, dropped = GroupJournal(tmp_path / "new", "asked").recover(lambda _: True)
    assert dropped == 0 and [plain(one) for one in found.values()] == [plain(one) for one in written]


def test_groups_of_many_threads_are_all_written_and_those_that_wait_share_a_sync(tmp_path, monkeypatch) -> None:
    sync, syncs = os.fsync, []

    def slow(file: int) -> None:
        syncs.append(file)
        time.sleep(0.02)
        sync(file)

    monkeypatch.setattr(os, "fsync", slow)
    buffer = GroupJournal(tmp_path, "asked")
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda number: buffer.append(number % 2, group(number)), range(40)))
    assert {number: plain(one) for number, one in everything(buffer).items()} == {
        number: plain(group(number)) for number in range(40)
    }
    assert len(syncs) < 30


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(cut=st.floats(0, 1), flip=st.booleans())
def test_a_tail_that_is_cut_short_or_damaged_costs_only_the_groups_from_there_on(tmp_path, cut, flip) -> None:
    folder = tmp_path / "torn"
    buffer = GroupJournal(folder, "asked")
    buffer.keep(())
    sizes = []
    for number in range(3):
        buffer.append(7, group(number))
        sizes.append((folder / "step_000007.groups").stat().st_size)
    path, content = folder / "step_000007.groups", (folder / "step_000007.groups").read_bytes()
    at = int(cut * (len(content) - 1))
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] if flip else content[:at])
    whole = sum(size <= at for size in sizes)
    assert list(everything(buffer)) == list(range(whole))
    buffer.append(7, group(9))
    assert list(everything(buffer)) == [*range(whole), 9], "what is appended afterwards can be read"


def test_what_is_not_usable_is_gone_for_good(tmp_path) -> None:
    buffer = GroupJournal(tmp_path, "asked")
    for number, version in enumerate((1, 2, 3)):
        buffer.append(0, group(number, version))
    newest = lambda one: max(t.sampled_by[-1] for t in one.trajectories)  # noqa: E731
    found, dropped = buffer.recover(lambda one: newest(one) <= 3)
    assert (list(found), dropped) == ([0, 1], 1)
    assert list(everything(buffer)) == [0, 1]
    assert buffer.recover(lambda _: False) == ({}, 2) and not list(tmp_path.iterdir())


def test_a_group_that_is_there_twice_is_read_once(tmp_path) -> None:
    buffer = GroupJournal(tmp_path, "asked")
    buffer.append(0, group(1))
    buffer.append(0, group(1, seed=1))
    buffer.append(1, group(1, seed=2))
    found, dropped = buffer.recover(lambda _: True)
    assert (list(found), plain(found[1]), dropped) == ([1], plain(group(1)), 2)


def test_groups_that_were_sampled_with_other_settings_are_not_read(tmp_path) -> None:
    GroupJournal(tmp_path, "temperature 1").append(0, group(1))
    assert GroupJournal(tmp_path, "temperature 0.5").recover(lambda _: True) == ({}, 1)


def test_groups_of_a_version_without_counts_of_tools_are_not_read(tmp_path) -> None:
    buffer = GroupJournal(tmp_path, "asked")
    buffer.append(0, replace(group(1), tool_use=()))  # three numbers, as that version wrote them
    assert buffer.recover(lambda _: True) == ({}, 1)


def test_files_of_other_steps_are_removed(tmp_path) -> None:
    buffer = GroupJournal(tmp_path, "asked")
    for step in range(5):
        buffer.append(step, group(step))
    buffer.keep(range(1, 3))
    assert list(everything(buffer)) == [1, 2]


def test_a_reward_that_is_no_number_comes_back_as_such(tmp_path) -> None:
    one = group(1)
    bad = replace(one, trajectories=[t.with_reward(float("nan")) for t in one.trajectories])
    GroupJournal(tmp_path, "asked").append(0, bad)
    assert all(np.isnan(t.reward) for t in everything(GroupJournal(tmp_path, "asked"))[1].trajectories)


def test_a_folder_that_cannot_be_written_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    buffer = GroupJournal(tmp_path / "file" / "rollouts", "asked")
    with ThreadPoolExecutor(8) as threads:  # also those that another thread writes
        for outcome in [threads.submit(buffer.append, 0, group(number)) for number in range(20)]:
            with pytest.raises(CheckpointError, match=r"step_000000\.groups cannot be written .*free space"):
                outcome.result()
