"""A group's trajectories are correct after aborts, and turn by turn with an environment."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.engines.pool import GenerationRequest, Sample
from megatron_rl.errors import EngineError
from megatron_rl.sampling.group import Group, GroupSettings, sample_group, sampling_seed
from megatron_rl.sampling.trajectory_builder import ToolUse, TrajectoryBuilder
from megatron_rl.tasks.task import Observation
from megatron_rl.types import Prompt, Trajectory
from tests.trajectories import DTYPES, make_sample
from tests.unit.sampling.scripted_engine import sample
from tests.unit.tasks.char_tokenizer import char_tokenizer

PROMPT = Prompt("p", "", (3, 4), "")
TOKENIZER = char_tokenizer()


def settings(**more) -> GroupSettings:
    given = {
        "seed": 7,
        "samples": 1,
        "max_new_tokens": 100,
        "temperature": 1.0,
        "stop_token_ids": (1,),
        "need_logmu": True,
    }
    return GroupSettings(**{**given, **more})


def draw(
    answers: list[list[Sample]] | Callable, how: GroupSettings, first_id: int = 40
) -> tuple[Group, list[GenerationRequest]]:
    """Return the group, and the requests that were sent for it."""
    asked: list[GenerationRequest] = []

    async def ask(request: GenerationRequest) -> list[Sample]:
        asked.append(request)
        return answers(request) if callable(answers) else answers[len(asked) - 1]

    return asyncio.run(sample_group(ask, PROMPT, how, first_id=first_id, group=5)), asked


def listed(trajectory: Trajectory) -> dict[str, list[float]]:
    """Return the columns of a trajectory as lists."""
    return {name: values.tolist() for name, values in trajectory.columns.items()}


class Calculator:
    """An environment that returns the text of a turn in capitals if the turn ends with '?' and is not the last.

    A turn of dots is void. A turn that ends with '!?' fails.
    """

    max_turns = 3

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.lasts: list[bool] = []

    def observe(self, prompt: Prompt, turn: str, *, last: bool) -> Observation:
        turn = turn.replace(" ", "")  # the tokenizer of single characters separates them by spaces
        self.heard.append(turn)
        self.lasts.append(last)
        called = turn.endswith("?") and not last
        return Observation(
            turn.upper() if called else None, void=turn.strip(".") == "", failed=called and turn.endswith("!?")
        )


def written(text: str, version: int = 1, reason: str = "stop") -> Sample:
    return sample(
        *TOKENIZER.encode(text), *([TOKENIZER.eos_token_id] if reason == "stop" else []), version=version, reason=reason
    )


def test_a_response_of_one_turn_is_the_engines_sample_and_one_request() -> None:
    group, asked = draw([[sample(8, 1), sample(9, 9, reason="length")]], settings(samples=2))
    first, second = group.trajectories
    assert (first.id, first.group, first.finish_reason) == (40, 5, "stop")
    assert listed(first) == {"tokens": [8, 1], "mask": [1, 1], "versions": [1, 1], "logmu": [-4.0, -0.5]}
    assert (second.id, second.response_tokens.tolist(), second.finish_reason) == (41, [9, 9], "length")
    (request,) = asked
    assert (request.rid, tuple(request.prompt_tokens), request.n) == ("s7-t40", (3, 4), 2)
    assert request.sampling.seed == sampling_seed(7, 40) and request.sampling.max_new_tokens == 100


def test_an_aborted_sample_goes_on_from_its_prefix_with_what_is_left_of_its_budget() -> None:
    answers = [
        [sample(8, 9, reason="abort", version=1, retractions=1), sample(5, 1)],
        [sample(7, reason="abort", version=2)],
        [sample(6, 1, version=2, retractions=2)],
    ]
    group, asked = draw(answers, settings(samples=2))
    resumed, other = group.trajectories
    assert listed(resumed) == {
        "tokens": [8, 9, 7, 6, 1],
        "logmu": [-4.0, -4.5, -3.5, -3.0, -0.5],
        "versions": [1, 1, 2, 2, 2],
        "mask": [1] * 5,
    }
    assert resumed.finish_reason == "stop" and other.response_tokens.tolist() == [5, 1]
    assert (group.resumed, group.retractions) == (2, 3)
    assert [tuple(request.prompt_tokens) for request in asked[1:]] == [(3, 4, 8, 9), (3, 4, 8, 9, 7)]
    assert [(request.n, request.sampling.max_new_tokens) for request in asked[1:]] == [(1, 98), (1, 97)]
    assert len({request.sampling.seed for request in asked}) == len({request.rid for request in asked}) == 3


def test_a_sample_that_is_aborted_again_and_again_without_a_token_is_an_error_that_names_it() -> None:
    with pytest.raises(EngineError, match="engines aborted trajectory 40 3 times in a row"):
        draw([[sample(reason="abort")]] * 9, settings())
    slow = [[sample(8, reason="abort")], [sample(reason="abort")], [sample(9, reason="abort")]]
    group, _ = draw([*slow, [sample(reason="abort")], [sample(1)]], settings())
    assert group.trajectories[0].response_tokens.tolist() == [8, 9, 1]


def test_turns_and_observations_alternate_and_only_the_models_tokens_are_trained() -> None:
    environment = Calculator()
    how = settings(environment=environment, tokenizer=TOKENIZER)
    group, asked = draw([[written("a?")], [written("bc?", version=2)], [written("d", version=3)]], how)
    (found,) = group.trajectories
    assert environment.heard == ["a?", "bc?", "d"]
    parts = [
        written("a?").tokens,
        TOKENIZER.encode("A?"),
        written("bc?").tokens,
        TOKENIZER.encode("BC?"),
        written("d").tokens,
    ]
    tokens, mask = [token for part in parts for token in part], [1] * 3 + [0] * 2 + [1] * 4 + [0] * 3 + [1] * 2
    assert listed(found) == {
        "tokens": tokens,
        "mask": mask,
        "versions": [1] * 3 + [-1] * 2 + [2] * 4 + [-1] * 3 + [3] * 2,
        "logmu": [-0.5 * token if trained else 0.0 for token, trained in zip(tokens, mask, strict=True)],
    }
    assert found.finish_reason == "stop" and group.resumed == 0
    assert [tuple(request.prompt_tokens) for request in asked] == [
        (3, 4),
        (3, 4, *found.response_tokens[:5]),
        (3, 4, *found.response_tokens[:12]),
    ]
    assert [request.sampling.max_new_tokens for request in asked] == [100, 95, 88]


def test_no_turn_follows_the_last_one_that_is_allowed() -> None:
    environment = Calculator()
    group, asked = draw(lambda _: [written("a?")], settings(environment=environment, tokenizer=TOKENIZER))
    assert len(asked) == 3 and environment.heard == ["a?"] * 3 and environment.lasts == [False, False, True]
    assert group.tool_use == ToolUse(calls=2), "nothing is run after the last turn"
    assert group.trajectories[0].response_tokens[-3:].tolist() == written("a?").tokens.tolist(), (
        "an answer that nobody reads is not appended"
    )


def test_an_observation_that_leaves_no_room_for_an_answer_ends_the_response_as_cut_off() -> None:
    for limit, requests in ((6, 2), (5, 1)):
        how = settings(environment=Calculator(), tokenizer=TOKENIZER, max_new_tokens=limit)
        group, asked = draw([[written("a?")], [sample(9, reason="length")]], how)
        assert len(asked) == requests and group.trajectories[0].finish_reason == "length"
        assert len(group.trajectories[0].response_tokens) == (6 if requests == 2 else 3)


def test_a_void_turn_is_masked_from_its_first_token_also_when_it_was_interrupted() -> None:
    how = settings(environment=Calculator(), tokenizer=TOKENIZER)
    answers = [[written("a?")], [written(".", reason="abort")], [written(".")]]
    group, _ = draw(answers, how)
    (found,) = group.trajectories
    assert found.columns["mask"].tolist() == [1] * 3 + [0] * 2 + [0] * 3
    assert found.columns["versions"].tolist() == [1] * 3 + [-1] * 2 + [1] * 3 and group.resumed == 1


def test_calls_errors_and_void_turns_of_all_samples_of_a_group_are_counted() -> None:
    how = settings(environment=Calculator(), tokenizer=TOKENIZER, samples=3)
    first = [written("a!?"), written("."), written("b", reason="length")]
    group, _ = draw(lambda request: first if request.n == 3 else [written(".")], how)
    assert group.tool_use == ToolUse(calls=1, errors=1, void=2)
    assert draw([[written("a?")]], settings())[0].tool_use == ToolUse(), "without an environment nobody looks"


def test_a_turn_that_was_cut_off_is_not_shown_to_the_environment() -> None:
    environment = Calculator()
    group, _ = draw([[written("a?", reason="length")]], settings(environment=environment, tokenizer=TOKENIZER))
    assert environment.heard == [] and group.trajectories[0].finish_reason == "length"


def test_what_nobody_can_train_on_is_refused_in_every_turn() -> None:
    broken = make_sample([4], logmu=[float("nan")])
    with pytest.raises(EngineError, match="non-finite behavior log-probabilities in trajectory 40"):
        draw([[written("a?")], [broken]], settings(environment=Calculator(), tokenizer=TOKENIZER))
    with pytest.raises(EngineError, match=r"the engine failed on trajectory 41: out of memory"):
        draw([[sample(1), make_sample([], "abort", fault="out of memory", logmu=[])]], settings(samples=2))


PIECES = st.lists(
    st.one_of(
        st.tuples(
            st.just("sample"),
            st.lists(st.integers(2, 90), max_size=5),
            st.lists(st.integers(1, 4), min_size=1, max_size=3),
        ),
        st.tuples(st.just("tool"), st.lists(st.integers(2, 90), max_size=5), st.just([0])),
    ),
    min_size=1,
    max_size=8,
)


@given(PIECES, st.booleans(), st.integers(0, 2))
def test_however_a_response_is_put_together_every_column_speaks_of_the_same_tokens(pieces, logmu, topk) -> None:
    more = ["logmu"] * logmu + ["topk_ids", "topk_logmu"] * (topk > 0)
    response: TrajectoryBuilder | None = None
    want: dict[str, list] = {name: [] for name in ("tokens", "mask", "versions", *more)}
    for kind, piece, versions in [("sample", [], [1]), *pieces]:
        columns = {
            "tokens": piece,
            "versions": [versions[at % len(versions)] for at in range(len(piece))],
            "logmu": [-float(t) for t in piece],
            "topk_ids": np.array(piece, np.int32)[:, None].repeat(topk, 1).reshape(len(piece), topk),
            "topk_logmu": -np.array(piece, np.float32)[:, None].repeat(topk, 1).reshape(len(piece), topk),
        }
        mask = int(kind == "sample")
        if response is None:
            response = TrajectoryBuilder(make_sample(**{n: c for n, c in columns.items() if n in want}))
        elif mask:
            response.add_sample(make_sample(**{n: c for n, c in columns.items() if n in want}))
        else:
            response.add_observation(piece)
            columns |= {"versions": [-1] * len(piece), "logmu": [0] * len(piece)}
            columns |= {name: np.zeros_like(columns[name]) for name in ("topk_ids", "topk_logmu")}
        for name, values in {**columns, "mask": [mask] * len(piece)}.items():
            if name in want:
                want[name] += np.array(values).tolist()
    assert response is not None
    made = response.trajectory(1, 2, PROMPT)
    assert listed(made) == want
    assert all(made.columns[name].dtype == DTYPES[name] for name in want)
    assert response.length == len(want["tokens"]) == len(made.response_tokens)


def test_the_experts_of_a_token_stay_those_that_were_chosen_when_it_was_sampled():
    def sample(tokens: int, rows: int, name: int) -> Sample:
        return make_sample(range(tokens), "abort", routing=np.full((rows, 1, 2), name))

    response = TrajectoryBuilder(sample(3, 5 + 3 - 1, 1))  # a prompt of 5 tokens
    response.add_sample(sample(2, 8 + 2 - 1, 2))  # the prompt of the second request is everything before it
    assert response.routing is not None
    assert response.routing[:, 0, 0].tolist() == [1] * 7 + [2] * 2


def test_the_experts_of_tokens_whose_request_did_not_tell_are_unknown_not_those_chosen_later():
    def sample(tokens: int, rows: int, name: int) -> Sample:
        routing = np.full((rows, 1, 2), name) if name else None
        return make_sample(range(tokens), "abort", routing=routing)

    response = TrajectoryBuilder(sample(0, 0, 0))  # ended while it waited: the engine chose no experts for it
    response.add_sample(sample(3, 5 + 3 - 1, 1))  # a prompt of 5 tokens
    response.add_sample(sample(2, 0, 0))
    response.add_observation([7, 7])
    response.add_sample(sample(2, 12 + 2 - 1, 3))
    assert response.routing is not None
    assert response.routing[:, 0, 0].tolist() == [1] * 7 + [-1] * 2 + [3] * 4
