"""The scheduler starts, replaces and discards groups as the staleness allows."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_rl.engines.pool import GenerationRequest, Sample
from megatron_rl.errors import CheckpointError, EngineError, UserError
from megatron_rl.sampling.group import Group, GroupSettings
from megatron_rl.sampling.journal import GroupJournal, _payloads
from megatron_rl.sampling.scheduler import Bounds, Scheduler, Source
from megatron_rl.sampling.step_groups import PromptDraws, StepGroups
from megatron_rl.tasks.reward import Score
from megatron_rl.types import Prompt, Trajectory
from tests.unit.sampling.scripted_engine import ScriptedPool, sample

STEPS = 6
SETTINGS = GroupSettings(seed=0, samples=2, max_new_tokens=9, temperature=1.0, stop_token_ids=(), need_logmu=True)


class World:
    """A pool whose engine is a function of the request. It serves `version`, and holds the draws in `held`.

    Attributes:
        version: the weight version that is served.
        held: draws whose samples are not returned until they are removed from the set.
        equal: draws whose rewards are all equal.
        serves: by draw, the weight versions of its samples, one after the other; `version` for other draws.
        verified_in: names of the threads that verified.
    """

    def __init__(self, folder: Path) -> None:
        self.version, self.folder = 1, folder
        self.held: set[int] = set()
        self.equal: set[int] = set()
        self.serves: dict[int, list[int]] = {}
        self.verified_in: set[str] = set()
        self.pool = ScriptedPool(self.answer)

    async def answer(self, request: GenerationRequest) -> list[Sample]:
        draw = request.prompt_tokens[0] - 100
        began = self.version
        while draw in self.held:
            await asyncio.sleep(0.001)
        versions = self.serves.get(draw)
        version = versions.pop(0) if versions else began
        return [sample(draw + 1, k + 1, version=version) for k in range(request.n)]

    def rewards(self, prompt: Prompt, rows: list[Trajectory]) -> list[Score]:
        self.verified_in.add(threading.current_thread().name)
        draw = prompt.tokens[0] - 100
        return [Score(1.0 if draw in self.equal else float(k)) for k in range(len(rows))]

    def sampler(self, draws: PromptDraws | None = None, found: dict[int, Group] | None = None, **more) -> Scheduler:
        given = {"wanted": 3, "asked": 3, "replaceable": 0, "max_staleness": 0, "steps": STEPS, "deterministic": False}
        source = Source(lambda draw: Prompt(f"p{draw}", "", (100 + draw,), ""), self.rewards, longest_prompt=4)
        buffer = GroupJournal(self.folder, "")
        return Scheduler(
            self.pool, SETTINGS, source, Bounds(**{**given, **more}), draws or PromptDraws(), buffer, found or {}
        )

    @property
    def asked(self) -> list[int]:
        return [request.prompt_tokens[0] - 100 for request in self.pool.asked]

    def until_asked(self, draws: set[int]) -> None:
        for _ in range(2000):
            if draws <= set(self.asked):
                return
            threading.Event().wait(0.001)
        pytest.fail(f"{draws - set(self.asked)} were never begun")

    def until_written(self, step: int, groups: int) -> None:
        file = self.folder / f"step_{step:06d}.groups"
        for _ in range(2000):
            if file.is_file() and len(_payloads(file.read_bytes())) == groups:
                return
            threading.Event().wait(0.005)
        pytest.fail(f"{file} never held {groups} groups")

    def rest(self) -> None:
        """Wait long enough for everything that can start to start."""
        threading.Event().wait(0.05)


@pytest.fixture
def world(tmp_path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.held.clear()
    world.pool.close()


def numbers(taken: StepGroups) -> list[int]:
    return [group.number for group in taken.chosen()]


def versions(taken: StepGroups) -> set[int]:
    return {version for group in taken.chosen() for t in group.trajectories for version in t.sampled_by}


def test_strictly_on_policy_nothing_runs_while_the_trainer_works(world) -> None:
    sampler = world.sampler()
    for step in range(3):
        world.version = step + 1
        taken = sampler.take(step, step + 1)
        world.rest()
        assert world.asked == list(range(3 * step + 3))
        assert numbers(taken) == list(range(3 * step, 3 * step + 3)) and versions(taken) == {step + 1}
    ids = [t.id for t in taken.chosen()[0].trajectories]
    assert ids == [12, 13] and taken.chosen()[0].trajectories[1].reward == 1.0
    assert sampler.draws.below == 9 and all(name != threading.current_thread().name for name in world.verified_in)


@pytest.mark.parametrize("k", [1, 2])
def test_steps_begin_as_early_as_the_staleness_allows_and_no_earlier(world, k) -> None:
    sampler = world.sampler(max_staleness=k)
    for step in range(STEPS):
        world.version = step + 1
        taken = sampler.take(step, step + 1)
        last = min(step + k, STEPS - 1)
        world.until_asked(set(range(3 * last + 3)))
        world.rest()
        assert sorted(world.asked) == list(range(3 * last + 3)), "of steps that are allowed and belong to the run"
        assert numbers(taken) == list(range(3 * step, 3 * step + 3))
        assert versions(taken) == {max(step + 1 - k, 1)}


def test_a_group_that_goes_on_through_an_update_is_waited_for(world) -> None:
    sampler = world.sampler(max_staleness=1)
    world.held = {4}
    sampler.take(0, 1)
    world.until_asked({3, 4, 5})
    world.version = 2
    with ThreadPoolExecutor(1) as thread:
        taking = thread.submit(sampler.take, 1, 2)
        world.rest()
        assert not taking.done()
        world.held.clear()
        assert numbers(taking.result(timeout=5)) == [3, 4, 5]


def test_groups_sampled_by_older_weights_than_allowed_are_sampled_again_and_counted(world) -> None:
    sampler = world.sampler()
    world.serves = {1: [0]}
    taken = sampler.take(0, 1)
    assert taken.dropped_stale == 1 and sorted(world.asked) == [0, 1, 1, 2] and versions(taken) == {1}
    world.serves = {4: [0, 2, 2]}
    world.version = 2
    taken = sampler.take(1, 2)
    assert taken.dropped_stale == 1


@pytest.mark.parametrize("version", [0, 7])
def test_an_engine_that_keeps_sampling_under_another_version_is_an_error_that_names_the_trajectories(
    world, version
) -> None:
    sampler = world.sampler(max_staleness=1)
    world.version = 2
    world.serves = {1: [version] * 9}
    with pytest.raises(EngineError, match=r"2 trajectories \(2, 3\) were not sampled under weight version 1 to 2"):
        sampler.take(0, 2)


def test_with_more_groups_than_wanted_the_slowest_are_aborted_and_counted(world) -> None:
    sampler = world.sampler(asked=5)
    world.held = {0, 3}
    taken = sampler.take(0, 1)
    assert numbers(taken) == [1, 2, 4]
    assert taken.counts()["given_up"] == 2 and taken.counts()["given_up_share"] == 0.4
    world.rest()
    assert sorted(world.pool.cancelled) == ["s0-t0", "s0-t6"], "trajectories of draws 0 and 3"
    world.held.clear()
    world.version = 2
    assert numbers(sampler.take(1, 2)) and sampler.draws.below == 10, "given up is not asked for again"


def test_equal_rewards_are_replaced_by_new_prompts_within_the_bound(world) -> None:
    sampler = world.sampler(replaceable=2)
    world.equal = {0, 1, 2}
    taken = sampler.take(0, 1)
    counts = taken.counts()
    assert (counts["replaced"], counts["kept_equal"]) == (2, 1)
    assert len(numbers(taken)) == 3 and {3, 4} < set(numbers(taken))
    assert sampler.draws.below == 5


def test_a_deterministic_step_begins_when_the_one_before_has_its_groups_and_an_update_waits_for_all(world) -> None:
    sampler = world.sampler(max_staleness=2, deterministic=True, replaceable=1)
    world.equal = {4}
    world.held = {1, 6}
    with ThreadPoolExecutor(1) as thread:
        taking = thread.submit(sampler.take, 0, 1)
        world.until_asked({0, 1, 2})
        world.rest()
        assert sorted(world.asked) == [0, 1, 2]
        world.held = {6}
        taking.result(timeout=5)
        settling = thread.submit(sampler.settle)
        world.until_asked(set(range(7)))
        world.rest()
        assert not settling.done(), "draw 6 replaces draw 4 of the next step"
        world.held = set()
        settling.result(timeout=5)
    assert sorted(world.asked) == list(range(10)), "all steps that may begin have"
    assert numbers(sampler.take(1, 2)) == [3, 5, 6]
    assert numbers(sampler.take(2, 3)) == [7, 8, 9]


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_step_whose_groups_an_earlier_life_took_is_not_waited_for(world, staleness) -> None:
    sampler = world.sampler(PromptDraws(3), max_staleness=staleness, deterministic=True)
    sampler.skip(0, 1)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(sampler.settle).result(timeout=5)
    assert sorted(world.asked) == [3, 4, 5][: 3 * staleness]
    world.version = 2
    assert numbers(sampler.take(1, 2)) == [3, 4, 5]


def test_a_step_does_not_wait_for_the_disk_but_a_deterministic_update_does(world, monkeypatch) -> None:
    """Without its record, a group that old weights sampled could not be sampled again after a kill."""
    disk = threading.Event()
    append = GroupJournal.append
    monkeypatch.setattr(GroupJournal, "append", lambda *given: disk.wait(10) and append(*given))
    sampler = world.sampler(max_staleness=1, deterministic=True, steps=1)
    assert numbers(sampler.take(0, 1)) == [0, 1, 2]
    with ThreadPoolExecutor(1) as thread:
        settling = thread.submit(sampler.settle)
        world.rest()
        assert not settling.done()
        disk.set()
        settling.result(timeout=5)
    world.until_written(0, 3)


def test_a_disk_that_fails_ends_the_run_at_the_next_step(world, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(GroupJournal, "append", fail)
    sampler = world.sampler()
    sampler.take(0, 1)
    world.rest()
    world.version = 2
    with pytest.raises(CheckpointError, match="the disk is full"):
        sampler.take(1, 2)


def test_a_deterministic_update_is_not_made_after_a_disk_that_failed(world, monkeypatch) -> None:
    late = threading.Event()

    def fail(*_: object) -> None:
        late.wait(10)
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(GroupJournal, "append", fail)
    sampler = world.sampler(max_staleness=1, deterministic=True)
    sampler.take(0, 1)
    world.until_asked({3, 4, 5})
    late.set()
    with pytest.raises(CheckpointError, match="the disk is full"):
        sampler.settle()


def test_without_determinism_an_update_waits_for_nothing(world) -> None:
    sampler = world.sampler(max_staleness=1)
    world.held = {4}
    sampler.take(0, 1)
    with ThreadPoolExecutor(1) as thread:
        settling = thread.submit(sampler.settle)
        try:
            settling.result(timeout=5)
            world.until_asked({4})
        finally:
            world.held = set()
    assert settling.done()


def test_finished_groups_of_an_earlier_life_are_taken_where_they_are_fresh_enough(world, tmp_path) -> None:
    first = world.sampler(max_staleness=1)
    first.take(0, 1)
    world.until_written(1, 3)
    found, dropped = GroupJournal(tmp_path, "").recover(lambda group: group.number >= 3)
    assert (sorted(found), dropped) == ([3, 4, 5], 3), "everything finished is on disk, trained on or not"
    for k, again in ((1, []), (0, [3, 4, 5])):
        world.pool.asked.clear()
        world.version = 2
        second = world.sampler(PromptDraws(3), dict(found), max_staleness=k, steps=2)
        taken = second.take(1, 2)
        assert numbers(taken) == [3, 4, 5] and sorted(world.asked) == again
        assert taken.dropped_stale == len(again) and versions(taken) == {1 if k else 2}


def test_a_verifier_that_fails_ends_the_step_and_what_else_runs(world) -> None:
    sampler = world.sampler(max_staleness=1)

    def failing(prompt: Prompt, rows: list[Trajectory]) -> list[Score]:
        raise UserError(f"no verdict on {prompt.id}")

    world.held = {3, 4, 5}
    sampler.source = Source(sampler.source.prompt, failing, 4)
    with pytest.raises(UserError, match="no verdict on p"):
        sampler.take(0, 1)
    world.rest()
    assert len(world.pool.cancelled) == 3
    with pytest.raises(UserError, match="no verdict on p"):
        sampler.take(1, 2)


def test_what_a_reward_reports_besides_its_number_is_averaged_and_counted(world) -> None:
    def reporting(prompt: Prompt, rows: list[Trajectory]) -> list[Score]:
        return [Score(1.0, {"length": 4.0}), Score(0.0, failed=prompt.id == "p1")]

    sampler = world.sampler()
    sampler.source = Source(sampler.source.prompt, reporting, 4)
    taken = sampler.take(0, 1)
    assert taken.reward_metrics() == {"length": 4.0} and taken.reward_errors == 1
    found, _ = GroupJournal(world.folder, "").recover(lambda _: True)
    again = world.sampler(found=found)
    assert again.take(0, 1).reward_metrics() == {"length": 4.0}


def test_a_prompt_that_is_too_long_is_named(world) -> None:
    sampler = world.sampler()
    sampler.source = Source(lambda _: Prompt("long", "", (1,) * 5, ""), world.rewards, 4)
    with pytest.raises(UserError, match="prompt 'long' has 5 tokens"):
        sampler.take(0, 1)
