"""In responses of several turns from a real server, the engine's tokens stay unchanged between environment outputs."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from megatron_rl.engines.pool import EnginePool, GenerationRequest, Sample
from megatron_rl.sampling.batch import make_batch
from megatron_rl.sampling.group import GroupSettings, sample_group
from megatron_rl.tasks.task import Observation, Task
from megatron_rl.types import Prompt, Trajectory
from tests.contract.conftest import logp_of

PROMPT = Prompt("p", "", (5, 17, 250, 99, 3), "42")
STOPS = tuple(range(2, 40))  # one token in eight, so turns are short


def ambiguous_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with which most texts have several tokenizations.

    Every token is one or two letters: `abb` is a|b|b, ab|b or a|bb.
    """
    letters = "abcdefghijklmnop"
    pieces = [*letters, *(first + second for first in letters for second in letters)]
    vocabulary = {piece: 2 + at for at, piece in enumerate(pieces)} | {"<unk>": 0, "<eos>": 1}
    merges = [(piece[0], piece[1]) for piece in pieces if len(piece) == 2]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


TOKENIZER = ambiguous_tokenizer()


class Scripted(Task):
    """An environment that returns `says` after every turn except void turns and the last one, and records the turns."""

    def __init__(
        self, says: str | None = "abcabc", max_turns: int = 3, void: Callable[[int], bool] = lambda number: False
    ):
        self.train = self.held_out = [PROMPT]
        self.says, self.max_turns, self.void = says, max_turns, void
        self.heard: list[str] = []

    def verify(self, prompt: Prompt, response: str) -> float:
        return 0.0

    def observe(self, prompt: Prompt, turn: str, *, last: bool) -> Observation:
        self.heard.append(turn)
        return Observation(void=True) if self.void(len(self.heard)) else Observation(None if last else self.says)


class Recorded:
    """Records the requests of a group and the samples of the engine, in order."""

    def __init__(self, pool: EnginePool) -> None:
        self.pool = pool
        self.asked: list[tuple[GenerationRequest, list[Sample]]] = []

    async def sample(self, request: GenerationRequest) -> list[Sample]:
        samples = await self.pool.sample(request)
        self.asked.append((request, samples))
        return samples

    def draw(self, task: Task, samples: int = 1, max_new_tokens: int = 100, seed: int = 1) -> list[Trajectory]:
        settings = GroupSettings(
            seed, samples, max_new_tokens, 1.0, STOPS, need_logmu=True, environment=task, tokenizer=TOKENIZER
        )
        return self.pool.run(sample_group(self.sample, PROMPT, settings, first_id=0, group=0)).trajectories


@pytest.fixture
def engine_side(url: str) -> Iterator[Recorded]:
    with EnginePool([url], timeout_s=120) as pool:
        yield Recorded(pool)


def turns_of(trajectory: Trajectory) -> list[tuple[int, tuple[int, ...]]]:
    """Return the runs of equal mask values: (mask, tokens)."""
    runs: list[tuple[int, tuple[int, ...]]] = []
    for value, token in zip(*(trajectory.columns[name].tolist() for name in ("mask", "tokens")), strict=True):
        if runs and runs[-1][0] == value:
            runs[-1] = (value, (*runs[-1][1], token))
        else:
            runs.append((value, (token,)))
    return runs


def test_engine_tokens_go_back_as_they_came_although_their_text_has_other_tokens(
    engine_side: Recorded, model: Qwen3ForCausalLM
) -> None:
    said = tuple(TOKENIZER.encode("abcabc", add_special_tokens=False))
    for seed in range(1, 17):  # a processor's own rounding decides what a seed samples
        engine_side.asked.clear()
        (trajectory,) = engine_side.draw(task := Scripted(), seed=seed)
        written = [tuple(samples[0].tokens.tolist()) for _, samples in engine_side.asked]
        if len(written) == 3 and any(TOKENIZER.encode(TOKENIZER.decode(tokens)) != list(tokens) for tokens in written):
            break
    else:
        pytest.fail("no seed gave three finished turns with a text of several tokenizations")
    assert tuple(trajectory.response_tokens) == (*written[0], *said, *written[1], *said, *written[2])
    for number, (request, _) in enumerate(engine_side.asked):
        before = [token for tokens in written[:number] for token in (*tokens, *said)]
        assert tuple(request.prompt_tokens) == (*PROMPT.tokens, *before)
        assert request.sampling.max_new_tokens == 100 - len(before)
    # The task gets the text without the tokens at which sampling stops.
    texts = [[token for token in tokens if token not in STOPS] for tokens in written]
    assert task.heard == [TOKENIZER.decode(tokens, skip_special_tokens=True) for tokens in texts]
    want = logp_of(model, list(PROMPT.tokens), list(trajectory.response_tokens))
    got, mask = (torch.from_numpy(trajectory.columns[name]) for name in ("logmu", "mask"))
    torch.testing.assert_close(got, want * mask, atol=1e-4, rtol=0)
    assert (want[mask == 0] < -1e-3).all(), "a forward pass has something to say of the observation, the engine has not"


def test_only_the_models_tokens_reach_the_batch_as_trained(engine_side: Recorded) -> None:
    trajectories = engine_side.draw(Scripted(), samples=4)
    batch = make_batch([replace(t, reward=1.0) for t in trajectories], "mean")
    assert batch.versions is not None and batch.logmu is not None
    for row, trajectory in enumerate(trajectories):
        span = slice(batch.cu_seqlens[row], batch.cu_seqlens[row + 1])
        expected = [0] * len(PROMPT.tokens) + trajectory.columns["mask"].tolist()
        assert batch.mask[span].tolist() == expected
        assert ((batch.versions[span] >= 0) == (batch.mask[span] > 0)).all()
        assert (batch.logmu[span][batch.mask[span] == 0] == 0).all()


@pytest.mark.parametrize("max_new_tokens", [10, 20, 30])
def test_all_turns_and_observations_share_one_budget(engine_side: Recorded, max_new_tokens: int) -> None:
    trajectories = engine_side.draw(Scripted(max_turns=50), samples=6, max_new_tokens=max_new_tokens)
    for trajectory in trajectories:
        assert len(trajectory.response_tokens) <= max_new_tokens
        assert trajectory.finish_reason == "length"
        assert turns_of(trajectory)[-1][0] == 1, "no response ends with words that nobody answers"


@pytest.mark.parametrize("max_turns", [1, 2, 4])
def test_a_response_has_no_more_turns_than_are_allowed(engine_side: Recorded, max_turns: int) -> None:
    trajectories = engine_side.draw(Scripted(max_turns=max_turns), samples=4, max_new_tokens=400)
    assert {len(turns_of(t)) for t in trajectories} == {2 * max_turns - 1}
    assert all(t.finish_reason == "stop" and t.response_tokens[-1] in (1, *STOPS) for t in trajectories)


def test_an_environment_that_says_nothing_ends_the_response_unmasked(engine_side: Recorded) -> None:
    (trajectory,) = engine_side.draw(Scripted(says=None))
    assert trajectory.columns["mask"].all() and len(engine_side.asked) == 1
    assert trajectory.last_turn.tolist() == trajectory.response_tokens.tolist()


def test_a_void_turn_is_masked_and_what_came_before_it_is_not(engine_side: Recorded) -> None:
    (trajectory,) = engine_side.draw(Scripted(void=lambda number: number == 2))
    first, second = (tuple(samples[0].tokens.tolist()) for _, samples in engine_side.asked)
    (trained, rest) = turns_of(trajectory)
    assert trained == (1, first) and rest[0] == 0 and rest[1][-len(second) :] == second
    assert len(trajectory.last_turn) == 0
