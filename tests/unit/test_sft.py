"""Warm-up batches train the solution and its end token, and do not train the prompt."""

import numpy as np
import pytest
import torch

from megatron_rl.config import TaskConfig
from megatron_rl.errors import UserError
from megatron_rl.objectives import LossInputs, LossNorm
from megatron_rl.sft import negative_log_likelihood, solution_batch, with_wrong_digit
from megatron_rl.tasks import make_task
from megatron_rl.tasks.task import Turn
from megatron_rl.types import Prompt
from tests.unit.tasks.char_tokenizer import char_tokenizer


def test_solutions_and_the_end_token_are_trained_and_prompts_are_not():
    tokenizer = char_tokenizer("0123456789+-=")
    task = make_task(TaskConfig(max_operand=12, held_out=5), tokenizer, seed=0, max_prompt_tokens=8)
    prompts = list(task.train[:20])
    batch = solution_batch(prompts, [task.demonstration(p) for p in prompts], tokenizer, tokenizer.eos_token_id)
    for row, prompt in enumerate(prompts):
        span = slice(batch.cu_seqlens[row], batch.cu_seqlens[row + 1])
        tokens, mask = batch.tokens[span], batch.mask[span]
        assert tokenizer.decode(tokens[mask == 0]).replace(" ", "") == prompt.text
        trained = tokens[mask == 1].tolist()
        assert trained[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(trained[:-1]).replace(" ", "") == prompt.answer
        assert mask.tolist() == sorted(mask.tolist())


def test_every_turn_and_its_end_are_trained_and_what_a_tool_says_between_them_is_not():
    tokenizer = char_tokenizer()
    prompt = Prompt(id="p", text="ab", tokens=tuple(tokenizer.encode("ab")), answer="")
    end = tokenizer.eos_token_id
    batch = solution_batch([prompt, prompt], [[Turn("cd", "efg"), Turn("h")], [Turn("i")]], tokenizer, end)

    def spelt(row: int, trained: int) -> list[str]:
        span = slice(batch.cu_seqlens[row], batch.cu_seqlens[row + 1])
        return tokenizer.convert_ids_to_tokens(batch.tokens[span][batch.mask[span] == trained].tolist())

    eos = tokenizer.eos_token
    assert (spelt(0, 1), spelt(0, 0)) == (["c", "d", eos, "h", eos], ["a", "b", "e", "f", "g"])
    assert (spelt(1, 1), spelt(1, 0)) == (["i", eos], ["a", "b"])


def test_the_loss_is_the_mean_negative_log_likelihood_of_trained_tokens():
    logp = torch.tensor([[-1.0, -2.0, -4.0, -8.0]], requires_grad=True)
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    inputs = LossInputs(logp, None, torch.zeros(1, 4), mask, norm=LossNorm("token_mean", tokens=4))
    out = negative_log_likelihood(inputs)
    out.loss.backward()
    assert out.loss.item() == 1.5  # six nats over the four tokens of the whole update
    assert logp.grad is not None and logp.grad.tolist() == [[0, -0.25, -0.25, 0]]


@pytest.mark.parametrize("solution", ["7", "120", "#### 45"])
def test_a_slip_changes_exactly_one_digit(solution):
    rng = np.random.default_rng(0)
    for _ in range(50):
        first, last = with_wrong_digit([Turn("call 1", "7"), Turn(solution)], rng)
        assert first == Turn("call 1", "7")
        slipped = last.text
        changed = [i for i, (a, b) in enumerate(zip(solution, slipped, strict=True)) if a != b]
        assert len(changed) == 1 and slipped[changed[0]].isdigit()


def test_a_solution_without_digits_cannot_slip():
    with pytest.raises(UserError, match="has no digit to get wrong"):
        with_wrong_digit([Turn("none")], np.random.default_rng(0))
