"""Every draw is returned once and none is skipped; a step is settled exactly when it has its groups."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.sampling.group import Group
from megatron_rl.sampling.step_groups import PromptDraws, StepGroups
from megatron_rl.sampling.trajectory_builder import ToolUse
from tests.trajectories import make_trajectory


def group(number: int, *rewards: float, resumed: int = 0) -> Group:
    rows = [make_trajectory(10 * number + k, number, (1,), (2,), r) for k, r in enumerate(rewards or (0, 1))]
    return Group(rows, resumed, 2 * resumed, ToolUse(10**number, 2 * 10**number, 3 * 10**number))


@given(st.integers(0, 5), st.sets(st.integers(0, 20)), st.lists(st.lists(st.integers(0, 4)), max_size=8))
def test_every_number_is_drawn_once_whatever_is_spent_and_restored_in_between(below, ahead, plan) -> None:
    draws = PromptDraws(below, ahead)
    spent = set(range(below)) | ahead
    for life in plan:
        handed = [draws.next() for _ in range(5)]
        fresh = [number for number in range(100) if number not in spent]
        assert handed == fresh[:5], "the lowest that are not spent"
        used = {handed[at] for at in life}
        draws.consume(used)
        spent |= used
        assert all(draws.is_consumed(number) == (number in spent) for number in range(60))
        draws = PromptDraws(draws.below, draws.ahead)  # as a resumed run restores them


def test_draws_of_steps_that_overlap_are_spent_in_any_order() -> None:
    draws = PromptDraws()
    first, second = [draws.next() for _ in range(3)], [draws.next() for _ in range(3)]
    draws.consume(second)
    assert (draws.below, draws.ahead) == (0, (3, 4, 5))
    draws.consume(first)
    assert (draws.below, draws.ahead, draws.next()) == (6, (), 6)


def begun(count: int, **more) -> StepGroups:
    step = StepGroups(3, **{"wanted": 2, **more})
    for draw in range(count):
        step.begin(draw)
    return step


def test_the_first_groups_that_finish_are_taken_in_the_order_of_their_draws() -> None:
    step = begun(4)
    assert step.finish(group(3, resumed=1)) == 0 and not step.settled
    assert step.finish(group(1)) == 0 and step.settled
    assert [taken.number for taken in step.chosen()] == [1, 3] and step.open == {0, 2}
    counts = step.counts()
    assert (counts["given_up"], counts["given_up_share"], counts["resumed"], counts["retractions"]) == (2, 0.5, 1, 2)


def test_groups_of_equal_rewards_are_replaced_up_to_the_bound_and_then_kept() -> None:
    step = begun(2, replaceable=1)
    assert step.finish(group(1, 1.0, 1.0)) == 1
    step.begin(2)
    assert step.finish(group(2, 0.0, 0.0)) == 0 and step.finish(group(0)) == 0
    assert [taken.number for taken in step.chosen()] == [0, 2]
    assert {name: step.counts()[name] for name in ("replaced", "kept_equal", "given_up")} == {
        "replaced": 1,
        "kept_equal": 1,
        "given_up": 0,
    }


def test_tool_use_is_of_the_groups_that_are_trained_on_and_of_no_others() -> None:
    step = begun(4, replaceable=1)
    step.finish(group(0, 1.0, 1.0))  # replaced
    for number in (1, 3, 2):
        step.finish(group(number))
    assert [taken.number for taken in step.chosen()] == [1, 3]
    assert step.tool_use() == ToolUse(1010, 2020, 3030)


@given(st.permutations(range(6)), st.integers(0, 4), st.lists(st.booleans(), min_size=20, max_size=20))
def test_in_waves_nothing_depends_on_who_finishes_first(order, replaceable, equal) -> None:
    def outcome(first: list[int]) -> tuple[list[int], dict]:
        step, draws = begun(6, wanted=6, replaceable=replaceable, in_waves=True), PromptDraws(6)
        queue = list(first)
        while queue:
            number = queue.pop(0)
            for _ in range(step.finish(group(number, 1, 1) if equal[number] else group(number))):
                fresh = draws.next()
                step.begin(fresh)
                queue.insert(0, fresh)
        assert step.settled
        return [taken.number for taken in step.chosen()], step.counts()

    numbers, counts = outcome(order)
    assert (numbers, counts) == outcome(sorted(order))
    assert counts["replaced"] == min(replaceable, sum(equal[: 6 + counts["replaced"]])) and counts["given_up"] == 0
    assert len(set(numbers)) == 6


@pytest.mark.parametrize("count", [0, 1])
def test_a_step_without_enough_groups_is_not_settled(count) -> None:
    step = begun(2)
    for draw in range(count):
        step.finish(group(draw))
    assert not step.settled
