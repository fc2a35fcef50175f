"""On-policy distillation equals its closed form, in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.objectives import LossInputs, make_objective
from tests.unit.objectives.specs import batch, f64, gradient, worked_inputs

TEACHER = [[0.5, 0.8, 0.03, 0.3], [0.9, 0.1, 0.5, 0.5]]


def test_loss_and_gradient_equal_the_worked_numbers():
    logp = worked_inputs().logp.clone().requires_grad_()
    out = make_objective({"name": "opd"})(worked_inputs(logp, logref=f64(TEACHER).log()))
    out.loss_tok.sum().backward()
    expected = f64([[0.218786, -0.554518, 0, 0.462098], [-1.559581, 16.479184, 0, 0]])
    torch.testing.assert_close(out.loss_tok.detach(), expected, atol=6e-7, rtol=0)
    torch.testing.assert_close(logp.grad, expected, atol=6e-7, rtol=0)
    assert out.loss.item() == pytest.approx(2.507662, abs=6e-7)
    assert out.metrics["opd/distance"].item() == pytest.approx(0.0979645, abs=6e-7)
    assert out.weight_tok is None


@given(st.integers(0, 10**6), st.sampled_from(["rollout", "trainer_old"]))
def test_in_expectation_it_is_the_reverse_divergence_to_the_teacher_whatever_policy_sampled(seed, denominator):
    """Every token of a small vocabulary occurs once, and its loss is weighted by its probability."""
    logits, teacher, sampler = torch.randn(
        3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).unbind()
    logits.requires_grad_()
    logp, logref, below = (scores.log_softmax(-1)[None] for scores in (logits, teacher, sampler))
    x = LossInputs(logp, logmu=below, logold=below, logref=logref, mask=torch.ones(1, 7))
    out = make_objective({"name": "opd", "ratio_denominator": denominator})(x)
    surrogate = (below.exp() * out.loss_tok).sum()
    divergence = (logp.exp() * (logp - logref)).sum()
    torch.testing.assert_close(surrogate, divergence, rtol=1e-10, atol=1e-13)
    (found,) = torch.autograd.grad(surrogate, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(divergence, logits)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


def test_a_student_that_is_its_teacher_learns_nothing_however_old_its_samples():
    x = batch(3, [4, 2])
    loss, grad = gradient(make_objective({"name": "opd"}), replace(x, logref=x.logp))
    assert loss == 0
    assert not grad.any()


def test_neither_rewards_nor_advantages_have_a_part_and_what_weighs_needs_the_trainers_policy():
    x = batch(4, [4, 2])
    loss, grad = gradient(make_objective({"name": "opd"}), x)
    other, same = gradient(make_objective({"name": "opd"}), replace(x, advantages=5 + x.advantages, rewards=None))
    assert loss == other and torch.equal(grad, same)
    assert make_objective({"name": "opd"}).needs == {"logmu", "logref"}
    assert make_objective({"name": "opd", "corrections": [{"name": "tis"}]}).needs == {"logmu", "logold", "logref"}
    with pytest.raises(UserError, match="opd needs 'logref'"):
        make_objective({"name": "opd"})(replace(x, logref=None))


def test_a_token_that_the_teacher_excludes_pushes_with_a_bound():
    x = LossInputs(f64([[-1.0]]), f64([[-1.0]]), mask=f64([[1]]), logref=f64([[-1e4]]))
    assert gradient(make_objective({"name": "opd"}), x)[1][0, 0, 0].item() == 20


def test_score_centering_has_no_advantages_to_multiply():
    with pytest.raises(ConfigError, match="opd has no advantages"):
        make_objective({"name": "opd", "score_centering": {"mode": "none"}})
