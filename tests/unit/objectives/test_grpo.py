"""The clipped surrogate is flat where its definition says so, and equals the worked numbers."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.objectives import LossInputs, make_objective
from tests.unit.objectives.specs import ADVANTAGES, MASK, MU, PI, f64


def run(logp: torch.Tensor, **keys):
    spec = {"name": "grpo", "clip_low": 0.2, "clip_high": 0.28, "norm": "token_mean", **keys}
    return make_objective(spec)(LossInputs(logp, f64(MU).log(), f64(ADVANTAGES), f64(MASK)))


def test_kept_tokens_and_loss_equal_the_worked_numbers():
    out = run(f64(PI).log())
    assert out.weight_tok.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert out.loss.item() == pytest.approx(-0.545833, abs=6e-7)
    assert out.metrics["clip/high"].item() == pytest.approx(2 / 6)
    assert out.metrics["clip/low"].item() == pytest.approx(1 / 6)
    assert "clip/dual" not in out.metrics, "without a bound there is nothing to count"


def test_dual_clip_bounds_the_loss_of_negative_advantages():
    logp = f64(PI).log().requires_grad_()
    out = run(logp, dual_clip=2.0)
    out.loss_tok.sum().backward()
    assert out.loss_tok[1, 0].item() == 1.0  # A = -0.5, r = 2.25 -> 0.5 * 2 instead of 1.125
    assert logp.grad[1, 0].item() == 0.0
    assert out.metrics["clip/dual"].item() == pytest.approx(1 / 6)


def test_the_default_norm_is_the_sequence_mean_of_token_means():
    spec = {"name": "grpo", "clip_high": 0.28}
    out = make_objective(spec)(LossInputs(f64(PI).log(), f64(MU).log(), f64(ADVANTAGES), f64(MASK)))
    per_sequence = [(-1.2 - 0.8 - 0.64 + 0.8) / 4, (1.125 - 2.56) / 2]
    assert out.loss.item() == pytest.approx(sum(per_sequence) / 2)


@given(
    st.floats(0.01, 30),
    st.floats(-3, 3),
    st.floats(0.05, 0.9),
    st.floats(0.05, 3),
    st.one_of(st.none(), st.floats(1.1, 12)),
)
def test_loss_and_gradient_follow_the_definition(ratio, a, low, high, dual):
    logp = f64([[-5 + math.log(ratio)]]).requires_grad_()
    objective = make_objective({"name": "grpo", "clip_low": low, "clip_high": high, "dual_clip": dual})
    out = objective(LossInputs(logp, f64([[-5.0]]), f64([a]), f64([[1]])))
    out.loss.backward()
    loss = max(-a * ratio, -a * min(max(ratio, 1 - low), 1 + high))
    flat = (a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low)
    if dual is not None and a < 0:
        loss, flat = min(loss, -a * dual), flat or ratio > dual
    assume(min(abs(ratio - edge) for edge in (1 - low, 1 + high, dual or 0)) > 1e-9)
    assert out.loss.item() == pytest.approx(loss, rel=1e-12, abs=1e-14)
    assert logp.grad.item() == (0.0 if flat else pytest.approx(-a * ratio, rel=1e-12))


def test_the_gradient_is_whole_exactly_on_the_boundaries():
    logp = f64([[0.3, -0.3, 0.9]]).requires_grad_()
    high, low, dual = logp.detach().exp()[0].tolist()  # high - 1 and 1 - low are exact, so the bounds equal the ratios
    objective = make_objective({"name": "grpo", "clip_low": 1 - low, "clip_high": high - 1, "dual_clip": dual})
    advantages = f64([[1, -1, -1]])
    objective(LossInputs(logp, f64([[0, 0, 0]]), advantages, f64([[1, 1, 1]]))).loss_tok.sum().backward()
    torch.testing.assert_close(logp.grad, -advantages * f64([[high, low, dual]]), rtol=1e-15, atol=0)


def test_trainer_old_divides_by_logold_and_needs_nothing_else():
    objective = make_objective({"name": "grpo", "ratio_denominator": "trainer_old", "norm": "token_mean"})
    assert objective.needs == {"logold"}
    with_old = objective(LossInputs(f64(PI).log(), None, f64(ADVANTAGES), f64(MASK), logold=f64(MU).log()))
    with_mu = make_objective({"name": "grpo", "norm": "token_mean"})(
        LossInputs(f64(PI).log(), f64(MU).log(), f64(ADVANTAGES), f64(MASK))
    )
    assert with_old.loss.item() == with_mu.loss.item()
    with pytest.raises(UserError, match="logold"):
        objective(LossInputs(f64(PI).log(), f64(MU).log(), f64(ADVANTAGES), f64(MASK)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ratio_denominator": "trainer"}, "did you mean 'trainer_old'"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"clip_hi": 0.2}, "did you mean 'clip_high'"),
        ({"norm": "token_men"}, "did you mean 'token_mean'"),
        ({"norm": {"horizn": 8}}, "did you mean 'horizon'"),
    ],
)
def test_an_illegal_option_is_refused_with_a_suggestion(keys, message):
    with pytest.raises(ConfigError, match=message):
        make_objective({"name": "grpo", **keys})


def test_an_unknown_objective_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'grpo'"):
        make_objective({"name": "grppo"})
