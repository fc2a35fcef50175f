"""A group that is aborted, updated or continued by its environment holds exactly the sampled tokens and their logp."""

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from megatron_rl.engines.pool import EnginePool
from megatron_rl.sampling.group import Group, GroupSettings, sample_group
from megatron_rl.tasks.task import Observation
from megatron_rl.types import Prompt, Trajectory
from tests.contract.conftest import WriteWeights, logp_of, until_running

PROMPT = Prompt("p", "", (5, 17, 250, 99, 3), "")
LONG = GroupSettings(seed=1, samples=6, max_new_tokens=600, temperature=1.0, stop_token_ids=(), need_logmu=True)
TOLERANCE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture
def pool(url: str) -> Iterator[EnginePool]:
    with EnginePool([url], timeout_s=120) as pool:
        yield pool


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model_dir)


def draw(pool: EnginePool, settings: GroupSettings = LONG) -> Group:
    return pool.run(sample_group(pool.sample, PROMPT, settings, first_id=0, group=0))


def draw_while(pool: EnginePool, act: Callable[[], None]) -> Group:
    """Return the group. `act` is called while it is generated."""
    running = pool.start(sample_group(pool.sample, PROMPT, LONG, first_id=0, group=0))
    with httpx.Client(base_url=pool.live_urls[0], timeout=60, trust_env=False) as client:
        until_running(client, running)
    time.sleep(0.05)  # so that some tokens are generated
    act()
    return running.result()


def assert_sampled_by(model: Qwen3ForCausalLM, trajectory: Trajectory, start: int = 0, end: int | None = None) -> None:
    """Assert that response tokens [start, end) have the log-probabilities of one plain forward pass of all tokens."""
    assert trajectory.logmu is not None
    want = logp_of(model, list(trajectory.prompt_tokens), list(trajectory.response_tokens))
    torch.testing.assert_close(torch.from_numpy(trajectory.logmu)[start:end], want[start:end], **TOLERANCE)


def test_aborted_samples_go_on_from_their_prefix_as_if_nothing_had_happened(
    pool: EnginePool, url: str, model: Qwen3ForCausalLM
) -> None:
    def abort() -> None:
        pool.pause(url, "abort")
        pool.resume(url)

    group = draw_while(pool, abort)
    assert group.resumed > 0, "no sample was running"
    for trajectory in group.trajectories:
        assert trajectory.finish_reason in ("stop", "length") and trajectory.columns["mask"].all()
        assert (trajectory.finish_reason == "length") == (len(trajectory.response_tokens) == LONG.max_new_tokens)
        assert trajectory.sampled_by == (0,)
        assert_sampled_by(model, trajectory)


@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
def test_through_a_weight_update_every_token_names_the_weights_that_sampled_it(
    mode: str,
    api: httpx.Client,
    pool: EnginePool,
    url: str,
    model: Qwen3ForCausalLM,
    other_tensors: dict[str, torch.Tensor],
    write_weights: WriteWeights,
) -> None:
    folder = write_weights(other_tensors, version=1)
    newer = copy.deepcopy(model)
    newer.load_state_dict(other_tensors)

    def update() -> None:
        pool.pause(url, mode)
        pool.update_weights_from_disk(url, folder, 1)
        if mode != "in_place":  # a cached prefix would be continued with keys and values of the old weights
            pool.flush(url)
        pool.resume(url)

    group = draw_while(pool, update)
    through = [t for t in group.trajectories if len(t.sampled_by) > 1]
    assert through, "no sample was running"
    for trajectory in through:
        versions = trajectory.columns["versions"].tolist()
        cut = versions.index(1)
        assert versions == [0] * cut + [1] * (len(versions) - cut)
        assert_sampled_by(model, trajectory, 0, cut)
        if mode != "in_place":  # in_place keeps the cache of the old weights
            assert_sampled_by(newer, trajectory, cut)
    assert (group.resumed > 0) == (mode == "abort") and (group.retractions > 0) == (mode == "retract")


class Echo:
    """An environment that returns a text after each of the first two turns."""

    max_turns = 3

    def __init__(self) -> None:
        self.heard: list[str] = []

    def observe(self, prompt: Prompt, turn: str, *, last: bool) -> Observation:
        self.heard.append(turn)
        return Observation("w7 w8 w9")


def test_a_response_of_several_turns_is_what_the_policy_writes_after_everything_before(
    pool: EnginePool, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    echo = Echo()
    stops = tuple(range(2, 40))  # turns of some eight tokens
    settings = GroupSettings(1, 4, 120, 1.0, stops, need_logmu=True, environment=echo, tokenizer=tokenizer)
    group = draw(pool, settings)
    for trajectory in group.trajectories:
        mask = trajectory.columns["mask"].tolist()
        assert trajectory.logmu is not None
        said = [at for at in range(len(mask)) if not mask[at]]
        tokens = trajectory.response_tokens
        assert [tokens[at] for at in said] == [7, 8, 9] * (len(said) // 3)
        for first in said[::3]:
            assert tokens[first - 1] in (1, *stops), "the turn before ended by itself"
        want = logp_of(model, list(PROMPT.tokens), list(tokens))
        torch.testing.assert_close(torch.from_numpy(trajectory.logmu), want * torch.tensor(mask), **TOLERANCE)
        assert ((trajectory.columns["versions"] >= 0) == (trajectory.columns["mask"] > 0)).all()
    assert any((t.columns["mask"] == 0).sum() == 6 for t in group.trajectories)
    assert len(echo.heard) >= 8
