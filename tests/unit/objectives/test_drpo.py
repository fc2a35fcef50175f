"""DRPO equals its closed forms, in float64."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.objectives import LossInputs, LossNorm, make_objective
from megatron_rl.objectives.drpo import DELTA_PRESETS
from tests.unit.objectives.specs import ADVANTAGES, MASK, MU, PI, f64, worked_inputs
from tests.unit.objectives.specs import one_token as token_of

WORKED = {
    0.04: {
        "w": [[-1.5, 3.5, 0.5, -6.5], [7.25, -6.0, 0, 0]],
        "loss_tok": [[-0.95, -0.55, -1.25, 1.916667], [3.078125, 68.0, 0, 0]],
        "grad": [[1.8, -2.8, -0.75, -4.333333], [8.15625, 180.0, 0, 0]],
        "token_mean": 11.707465,
        "seq_mean_token_mean": 17.665365,
        "seq_mean_token_sum": 35.122396,
        "seq_mean_token_sum_norm": 8.780599,
    },
    0.15: {
        "w": [[0.333333, 1.666667, 0.866667, -1.0], [2.666667, -0.866667, 0, 0]],
        "loss_tok": [[-1.133333, -0.733333, -1.433333, 1.0], [1.645833, -3.866667, 0, 0]],
        "grad": [[-0.4, -1.333333, -1.3, -0.666667], [3.0, 26.0, 0, 0]],
        "token_mean": -0.753472,
        "seq_mean_token_mean": -0.842708,
        "seq_mean_token_sum": -2.260417,
        "seq_mean_token_sum_norm": -0.565104,
    },
    12.5: {
        "w": [[0.992, 1.008, 0.9984, 0.976], [1.02, 0.9776, 0, 0]],
        "loss_tok": [[-1.1992, -0.7992, -1.4992, 0.670667], [1.13125, -29.6864, 0, 0]],
        "grad": [[-1.1904, -0.8064, -1.4976, 0.650667], [1.1475, -29.328, 0, 0]],
        "token_mean": -5.230347,
        "seq_mean_token_mean": -7.492154,
        "seq_mean_token_sum": -15.691042,
        "seq_mean_token_sum_norm": -3.922760,
    },
}

probability = st.floats(1e-6, 1 - 1e-6)
delta = st.floats(0.01, 20)
advantage = st.floats(-5, 5).filter(lambda a: abs(a) > 1e-3)


def one_token(pi: float, mu: float, a: float, d: float) -> tuple[float, float, float]:
    """Return loss, weight and dloss/dlogp of a single token."""
    return token_of({"name": "drpo", "delta": d}, pi, mu, a)


@pytest.mark.parametrize("d", WORKED)
def test_per_token_loss_weight_and_gradient_equal_the_worked_numbers(d):
    logp = f64(PI).log().requires_grad_()
    out = make_objective({"name": "drpo", "delta": d})(worked_inputs(logp))
    out.loss_tok.sum().backward()
    torch.testing.assert_close(out.weight_tok, f64(WORKED[d]["w"]), atol=6e-7, rtol=0)
    torch.testing.assert_close(out.loss_tok.detach(), f64(WORKED[d]["loss_tok"]), atol=6e-7, rtol=0)
    torch.testing.assert_close(logp.grad, f64(WORKED[d]["grad"]), atol=6e-7, rtol=0)


@pytest.mark.parametrize("d", WORKED)
@pytest.mark.parametrize("mode", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"])
def test_aggregated_loss_equals_the_worked_numbers(d, mode):
    out = make_objective({"name": "drpo", "delta": d, "norm": {"mode": mode, "horizon": 4}})(worked_inputs())
    assert out.loss.item() == pytest.approx(WORKED[d][mode], abs=6e-7)


def test_default_norm_is_the_papers_with_the_tensor_length_as_horizon():
    default = make_objective({"name": "drpo", "delta": 0.15})(worked_inputs())
    assert default.loss.item() == pytest.approx(WORKED[0.15]["seq_mean_token_sum_norm"], abs=6e-7)


@given(probability, probability, advantage, delta)
def test_the_gradient_is_minus_a_r_w_with_w_in_closed_form(pi, mu, a, d):
    _, weight, gradient = one_token(pi, mu, a, d)
    w = 1 - math.copysign(1, a) * (pi - mu) / d
    assert weight == pytest.approx(w, rel=1e-9, abs=1e-9)
    assert gradient == pytest.approx(-a * pi / mu * w, rel=1e-9, abs=1e-10)


@given(probability, advantage, delta)
def test_on_policy_the_weight_is_one_and_the_gradient_is_reinforce(mu, a, d):
    loss, weight, gradient = one_token(mu, mu, a, d)
    assert (loss, weight, gradient) == (pytest.approx(-a), 1.0, pytest.approx(-a))


@given(probability, advantage, st.floats(0.01, 0.9))
def test_the_weight_is_zero_at_the_boundary_and_linear_in_pi_around_it(mu, a, d):
    sign = math.copysign(1, a)
    edge = mu + sign * d
    assume(0.02 < edge < 0.98)
    assert one_token(edge, mu, a, d)[1] == pytest.approx(0, abs=1e-8)
    assert one_token(edge + sign * 0.01, mu, a, d)[1] == pytest.approx(-0.01 / d, abs=1e-8)
    assert one_token(edge - sign * 0.01, mu, a, d)[1] == pytest.approx(0.01 / d, abs=1e-8)


@given(probability, probability, advantage, delta)
def test_the_weight_is_bounded_and_exceeds_one_exactly_when_the_token_converges(pi, mu, a, d):
    weight = one_token(pi, mu, a, d)[1]
    assert 1 - 1 / d - 1e-9 <= weight <= 1 + 1 / d + 1e-9
    if abs(pi - mu) > 1e-9:
        assert (weight > 1) == (a * (pi - mu) < 0)


@given(probability, probability, advantage)
def test_a_huge_delta_leaves_the_plain_importance_sampled_loss(pi, mu, a):
    loss, weight, gradient = one_token(pi, mu, a, 1e15)
    assert loss == pytest.approx(-a * pi / mu, rel=1e-6)
    assert gradient == pytest.approx(-a * pi / mu, rel=1e-6)
    assert weight == pytest.approx(1, rel=1e-6)


@given(probability, probability, advantage, delta, st.floats(0.1, 10))
def test_the_loss_is_positively_homogeneous_in_the_advantage(pi, mu, a, d, k):
    loss, weight, _ = one_token(pi, mu, a, d)
    scaled_loss, scaled_weight, _ = one_token(pi, mu, k * a, d)
    assert scaled_loss == pytest.approx(k * loss, rel=1e-9, abs=1e-9)
    assert scaled_weight == pytest.approx(weight)
    assert one_token(pi, mu, -a, d)[1] == pytest.approx(2 - weight)


@given(probability, probability, advantage, delta)
def test_simple_po_with_epsilon_delta_over_mu_has_the_same_loss_and_gradient(pi, mu, a, d):
    loss, weight, gradient = token_of({"name": "simple_po", "epsilon": d / mu}, pi, mu, a)
    assert one_token(pi, mu, a, d) == (
        pytest.approx(loss, rel=1e-9, abs=1e-9),
        pytest.approx(weight, rel=1e-9, abs=1e-9),
        pytest.approx(gradient, rel=1e-9, abs=1e-9),
    )


def test_the_expected_penalty_is_the_squared_l2_distance():
    mu, pi, a = f64([[0.7, 0.2, 0.08, 0.02]]), f64([[0.5, 0.3, 0.1, 0.1]]), f64([[0.4, -1, 0.5, 2]])
    out = make_objective({"name": "drpo", "delta": 0.5})(LossInputs(pi.log(), mu.log(), a, torch.ones_like(mu)))
    penalty = out.loss_tok + a * pi / mu  # with delta 1/2 this is exactly |A| mu (r - 1)^2
    assert (mu * penalty).sum().item() == pytest.approx(0.039, abs=1e-12)
    out = make_objective({"name": "simple_po", "epsilon": 0.5})(LossInputs(pi.log(), mu.log(), a, torch.ones_like(mu)))
    assert (mu * (out.loss_tok + a * pi / mu)).sum().item() == pytest.approx(0.715357, abs=6e-7), "the chi-squared form"


@given(probability, advantage, delta)
def test_the_loss_is_convex_in_the_ratio_with_its_minimum_at_the_boundary(mu, a, d):
    def loss(r: float) -> float:
        return one_token(r * mu, mu, a, d)[0]

    best = 1 + math.copysign(1, a) * d / mu
    step = min(0.1, d / mu)
    assert loss(1 + step) + loss(1 - step / 2) * 2 >= 3 * loss(1) - 1e-9 * abs(a)
    if 0.01 < best < 1e6:
        assert loss(best) <= min(loss(best * 1.01), loss(best * 0.99)) + 1e-9 * abs(a * best)


@given(st.floats(1e-7, 1e-2), delta)
def test_the_weight_of_a_rare_token_depends_on_the_shift_alone(mu, d):
    assert one_token(mu + 0.05, mu, 1.0, d)[1] == pytest.approx(1 - 0.05 / d, rel=1e-6, abs=1e-9)
    assert token_of({"name": "simple_po", "epsilon": d}, mu + 0.05, mu, 1.0)[1] == pytest.approx(
        1 - 0.05 / mu / d, rel=1e-6
    )


def test_the_loss_does_not_depend_on_padding_when_the_horizon_is_given():
    wide = [
        torch.nn.functional.pad(t, (0, 3), value=float("nan")) for t in (f64(PI).log(), f64(MU).log(), f64(ADVANTAGES))
    ]
    objective = make_objective({"name": "drpo", "norm": {"horizon": 64}})
    padded = objective(LossInputs(*wide, torch.nn.functional.pad(f64(MASK), (0, 3))))
    assert padded.loss.item() == pytest.approx(objective(worked_inputs()).loss.item(), rel=1e-14)


@pytest.mark.parametrize("preset", [("paper", 12.5), ("conjecture", 0.04), ("dppo_matched", 0.15)])
def test_a_preset_is_a_name_for_one_of_the_worked_deltas(preset):
    name, value = preset
    out = make_objective({"name": "drpo", "delta": name})(worked_inputs())
    torch.testing.assert_close(out.weight_tok, f64(WORKED[value]["w"]), atol=6e-7, rtol=0)
    assert set(DELTA_PRESETS.values()) == WORKED.keys()


def test_the_default_is_the_value_of_the_paper():
    assert make_objective({"name": "drpo"}).delta == DELTA_PRESETS["paper"]


@pytest.mark.parametrize("name, value", DELTA_PRESETS.items())
def test_the_weight_leaves_its_sign_only_where_a_probability_can_move_by_delta(name, value):
    """At 12.5 no token is ever pulled back: |pi - mu| is at most 1."""
    farthest = token_of({"name": "drpo", "delta": name}, 1 - 1e-6, 1e-6, 1.0)[1]
    assert farthest == pytest.approx(1 - 1 / value, rel=1e-5)
    assert (farthest < 0) == (name != "paper")


@pytest.mark.parametrize("bad", [0, -1, "papers", float("nan"), True, None, [0.1]])
def test_an_illegal_delta_is_refused(bad):
    with pytest.raises(ConfigError, match="delta"):
        make_objective({"name": "drpo", "delta": bad})


def test_metrics_report_the_penalty_and_the_share_of_corrective_tokens():
    out = make_objective({"name": "drpo", "delta": 0.15, "norm": LossNorm("token_mean")})(worked_inputs())
    surrogate = (f64(ADVANTAGES) * f64(PI) / f64(MU) * f64(MASK)).sum() / 6
    assert out.metrics["penalty"].item() == pytest.approx((out.loss + surrogate).item())
    assert out.metrics["corrective"].item() == pytest.approx(2 / 6)
    assert not out.metrics["penalty"].requires_grad


def test_drpo_asks_for_behavior_log_probs():
    with pytest.raises(UserError, match="logmu"):
        make_objective({"name": "drpo"})(LossInputs(f64(PI).log(), None, f64(ADVANTAGES), f64(MASK)))
