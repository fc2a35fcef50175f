import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.config import TaskConfig
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.tasks import make_task, prompts_for_step
from tests.unit.tasks.char_tokenizer import char_tokenizer

TOKENIZER = char_tokenizer("0123456789+-=")


def arithmetic(seed: int = 0, max_prompt_tokens: int = 16, **keys):
    return make_task(TaskConfig(**keys), TOKENIZER, seed=seed, max_prompt_tokens=max_prompt_tokens)


def ids(prompts) -> list[str]:
    return [prompt.id for prompt in prompts]


@pytest.mark.parametrize("size", [2, 3, 10])
def test_train_and_held_out_together_are_every_problem_once(size):
    task = arithmetic(max_operand=size, held_out=2)
    additions = {f"{a}+{b}" for a in range(size) for b in range(size)}
    subtractions = {f"{a}-{b}" for a in range(size) for b in range(a + 1)}
    assert len(task.held_out) == 2
    assert sorted([*ids(task.train), *ids(task.held_out)]) == sorted(additions | subtractions)


def test_every_prompt_reads_as_its_problem_and_has_the_right_answer():
    task = arithmetic(max_operand=20)
    for prompt in [*task.train, *task.held_out]:
        assert prompt.text == f"{prompt.id}="
        assert TOKENIZER.decode(prompt.tokens).replace(" ", "") == prompt.text
        assert int(prompt.answer) == eval(prompt.id) >= 0


def test_the_solution_verifies_and_nothing_else_does():
    task = arithmetic()
    prompt = next(p for p in task.train if p.answer == "12")
    assert task.verify(prompt, task.solution(prompt)) == 1.0
    for response in ["12<eos>", " 12 \n", "12<eos><pad><pad>"]:
        assert task.verify(prompt, response) == 1.0
    for response in ["", "1", "112", "12 12", "012", "12<eos>1", "twelve", "=12"]:
        assert task.verify(prompt, response) == 0.0


def test_the_split_depends_on_the_seed_alone():
    assert ids(arithmetic(seed=3).held_out) == ids(arithmetic(seed=3).held_out)
    assert ids(arithmetic(seed=3).held_out) != ids(arithmetic(seed=4).held_out)
    assert len(arithmetic(seed=-1).held_out) == 64


def test_too_few_problems_for_the_held_out_share_are_refused():
    with pytest.raises(ConfigError, match=r"7 problems.*lower"):
        arithmetic(max_operand=2, held_out=7)


def test_a_prompt_over_the_token_limit_is_refused_at_construction():
    with pytest.raises(ConfigError, match=r"6 tokens.*raise rollout.max_prompt_tokens"):
        arithmetic(max_operand=20, max_prompt_tokens=5)


def test_a_tokenizer_that_cannot_spell_a_problem_is_refused():
    with pytest.raises(ConfigError, match="cannot spell"):
        make_task(TaskConfig(), char_tokenizer("0123456789="), seed=0, max_prompt_tokens=16)


@given(st.integers(0, 40), st.integers(1, 20), st.integers(-5, 5))
def test_every_epoch_draws_each_problem_once_across_step_borders(epoch, count, seed):
    task = arithmetic(max_operand=2, held_out=0)
    size = len(task.train)
    first, last = epoch * size // count, (epoch + 1) * size // count + 1
    drawn = [prompt.id for step in range(first, last) for prompt in prompts_for_step(task, step, count, seed)]
    start = epoch * size - first * count
    assert sorted(drawn[start : start + size]) == sorted(ids(task.train))


def test_drawn_prompts_are_a_function_of_step_and_seed_and_epochs_differ():
    task = arithmetic()
    size = len(task.train)
    assert prompts_for_step(task, 7, 8, 1) == prompts_for_step(task, 7, 8, 1)
    assert prompts_for_step(task, 7, 8, 1) != prompts_for_step(task, 7, 8, 2)
    assert prompts_for_step(task, 0, size, 1) != prompts_for_step(task, 1, size, 1)


def test_an_impossible_draw_is_refused():
    with pytest.raises(UserError, match="step"):
        prompts_for_step(arithmetic(), -1, 8, 0)
