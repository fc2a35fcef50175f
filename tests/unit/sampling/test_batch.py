"""A step's trajectories become the columns of a batch, and the batch is cut into updates of whole groups."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.algorithms.policy_gradient import split_updates
from megatron_rl.errors import UserError
from megatron_rl.sampling.batch import make_batch
from megatron_rl.types import Trajectory
from tests.trajectories import columns_of, make_trajectory


def trajectory(
    at: int, group: int, prompt: int, response: int, reward: float | None = 0.0, logmu: bool = True
) -> Trajectory:
    return make_trajectory(
        100 + at,
        group,
        range(10, 10 + prompt),
        range(500 + 10 * at, 500 + 10 * at + response),
        reward,
        prompt_id=f"p{group}",
        logmu=[-0.5 - k for k in range(response)] if logmu else None,
    )


def with_columns(one: Trajectory, **columns: object) -> Trajectory:
    """Return the trajectory with other or further columns."""
    return replace(one, columns={**one.columns, **columns_of(one.response_tokens, **columns)})


THREE = [trajectory(0, 7, 2, 3, 1.0), trajectory(1, 7, 2, 1, 0.0), trajectory(2, 9, 1, 2, 1.0)]


def test_every_response_token_is_trained_and_carries_its_own_log_probability():
    batch = make_batch(THREE, "mean")
    assert batch.tokens.tolist() == [10, 11, 500, 501, 502, 10, 11, 510, 10, 520, 521]
    assert batch.cu_seqlens.tolist() == [0, 5, 8, 11]
    assert batch.mask.tolist() == [0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1]
    assert batch.logmu is not None
    assert batch.logmu.tolist() == [0, 0, -0.5, -1.5, -2.5, 0, 0, -0.5, 0, -0.5, -1.5]
    assert (batch.ids.tolist(), batch.groups.tolist(), batch.prompt_ids.tolist()) == (
        [100, 101, 102],
        [7, 7, 9],
        ["p7", "p7", "p9"],
    )
    assert (batch.rewards.tolist(), batch.advantages.tolist()) == ([1, 0, 1], [0.5, -0.5, 0])


def test_the_dtypes_are_those_a_batch_promises():
    batch = make_batch(THREE, "grpo")
    found = {
        name: getattr(batch, name).dtype.name
        for name in ("tokens", "mask", "logmu", "rewards", "advantages", "cu_seqlens")
    }
    expected = {"tokens": "int32", "mask": "float32", "logmu": "float32", "rewards": "float32", "advantages": "float32"}
    assert found == {**expected, "cu_seqlens": "int64"}


def test_without_behavior_log_probabilities_there_is_no_column_of_them():
    assert make_batch([trajectory(0, 0, 1, 1, logmu=False)], "mean").logmu is None


def with_topk(one: Trajectory, k: int = 2) -> Trajectory:
    """Return the trajectory with top-K ids and log-probabilities that encode trajectory, position and rank."""
    ids = (one.id * 100 + np.arange(len(one.response_tokens) * k)).reshape(-1, k).astype(np.int32)
    return with_columns(one, topk_ids=ids, topk_logmu=-ids / 1000)


def test_the_likeliest_tokens_stand_at_the_response_tokens_they_were_sampled_with():
    batch = make_batch([with_topk(one) for one in THREE], "mean")
    none = [0, 0]
    first, second, third = (
        [[10000, 10001], [10002, 10003], [10004, 10005]],
        [[10100, 10101]],
        [[10200, 10201], [10202, 10203]],
    )
    assert batch.topk_ids is not None and batch.topk_logmu is not None
    assert batch.topk_ids.tolist() == [none, none, *first, none, none, *second, none, *third]
    np.testing.assert_array_equal(batch.topk_logmu, (-batch.topk_ids / 1000).astype(np.float32))
    assert (batch.topk_ids.dtype.name, batch.topk_logmu.dtype.name) == ("int32", "float32")


def test_without_likeliest_tokens_there_are_no_columns_of_them():
    batch = make_batch(THREE, "mean")
    assert (batch.topk_ids, batch.topk_logmu, batch.token_advantages) == (None, None, None)


def test_likeliest_tokens_of_some_trajectories_only_are_refused():
    with pytest.raises(UserError, match=r"trajectories \[101\] carry no column 'topk_ids'"):
        make_batch([with_topk(THREE[0]), THREE[1], with_topk(THREE[2])], "mean")


def test_a_selection_takes_every_column_of_a_token_along():
    batch = make_batch([with_topk(one) for one in THREE], "mean")
    batch = batch.with_columns(token_advantages=np.arange(11, dtype=np.float32))
    chosen = batch.select(np.array([2, 0]))
    place = [8, 9, 10, 0, 1, 2, 3, 4]
    for name in ("tokens", "mask", "logmu", "topk_ids", "topk_logmu", "token_advantages"):
        np.testing.assert_array_equal(getattr(chosen, name), getattr(batch, name)[place])


def test_an_overlong_response_loses_advantage_and_keeps_its_reward():
    rows = [
        trajectory(0, 7, 2, 8, 1.0),
        trajectory(1, 7, 2, 10, 1.0),
        trajectory(2, 9, 1, 10, 1.0),
        trajectory(3, 9, 1, 10, 0.0),
    ]
    batch = make_batch(rows, "mean", overlong_buffer=4, max_new_tokens=10)
    assert batch.rewards.tolist() == [1, 1, 1, 0]
    np.testing.assert_allclose(batch.advantages, [0.25, -0.25, 0.5, -0.5])
    assert not make_batch(rows, "mean").advantages[:2].any()


@pytest.mark.parametrize("reward", [None, float("nan"), float("inf")])
def test_a_reward_that_is_no_number_refuses_the_step_by_trajectory(reward):
    with pytest.raises(UserError, match=r"not finite for trajectories \[101\]"):
        make_batch([THREE[0], replace(THREE[1], reward=reward), THREE[2]], "mean")


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.data())
def test_updates_are_whole_groups_and_together_the_whole_batch(sizes, data):
    rows = [group for group, size in enumerate(sizes) for _ in range(size)]
    batch = make_batch([trajectory(i, group, 1 + i % 3, 1 + i % 2) for i, group in enumerate(rows)], "mean")
    updates = data.draw(st.integers(1, len(sizes)))
    parts = split_updates(batch, updates)
    assert len(parts) == updates and all(len(part) for part in parts)
    assert sorted(np.concatenate([part.ids for part in parts]).tolist()) == sorted(batch.ids.tolist())
    groups = [set(part.groups.tolist()) for part in parts]
    assert sum(len(found) for found in groups) == len(sizes), "a group is in two updates"
    assert sum(part.mask.sum() for part in parts) == batch.mask.sum()
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


@pytest.mark.parametrize(
    ("column", "bad_id"), [("logmu", 101), ("token_advantages", 101), ("advantages", 102), ("rewards", 102)]
)
def test_a_column_that_is_not_finite_names_its_trajectory(column, bad_id):
    batch = make_batch(THREE, "mean")
    columns = {
        "logmu": batch.logmu,
        "token_advantages": batch.mask,
        "advantages": batch.advantages,
        "rewards": batch.rewards,
    }
    values = columns[column].astype(np.float32)
    row = int(np.flatnonzero(batch.ids == bad_id)[0])
    values[row if len(values) == len(batch) else batch.cu_seqlens[row + 1] - 1] = np.nan
    batch.check_finite()
    with pytest.raises(UserError, match=rf"{column} is not finite in trajectories \[{bad_id}\]"):
        batch.with_columns(**{column: values}).check_finite()


def test_numbers_of_tokens_that_are_not_trained_do_not_matter():
    batch = make_batch(THREE, "mean")
    logmu = np.where(batch.mask > 0, batch.logmu, np.nan)
    batch.with_columns(logmu=logmu).check_finite()


def test_tokens_a_mask_leaves_out_are_in_the_batch_but_not_trained():
    tool = with_columns(THREE[0], mask=[1, 0, 1], versions=[4, -1, 5])
    batch = make_batch([tool, with_columns(THREE[1], versions=[5])], "mean")
    assert batch.tokens.tolist() == [10, 11, 500, 501, 502, 10, 11, 510]
    assert batch.mask.tolist() == [0, 0, 1, 0, 1, 0, 0, 1]
    assert batch.logmu is not None and batch.logmu.tolist() == [0, 0, -0.5, 0, -2.5, 0, 0, -0.5]
    assert batch.versions is not None and batch.versions.tolist() == [-1, -1, 4, -1, 5, -1, -1, 5]


def test_routed_experts_stand_with_the_token_that_was_routed():
    def routed(one: Trajectory) -> Trajectory:
        tokens = len(one.prompt_tokens) + len(one.response_tokens) - 1
        return replace(one, routing=(one.id * 10 + np.arange(tokens * 2)).reshape(tokens, 1, 2))

    batch = make_batch([routed(t) for t in THREE], "mean")
    assert batch.routing is not None and batch.routing.shape == (11, 1, 2)
    assert batch.routing[[4, 7, 10]].tolist() == [[[-1, -1]]] * 3
    assert batch.select(np.array([1])).routing[:, 0].tolist() == [[1010, 1011], [1012, 1013], [-1, -1]]
    with pytest.raises(UserError, match=r"\[102\] carry no routed experts"):
        make_batch([routed(THREE[0]), THREE[2]], "mean")
