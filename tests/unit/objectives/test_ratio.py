"""GSPO, CISPO, SAPO, SimplePO and MiniRL equal their definitions, in float64."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_rl.objectives import LossInputs, make_objective
from tests.unit.objectives.specs import batch, f64, gradient, one_token, worked_inputs

probability = st.floats(1e-6, 1 - 1e-6)
advantage = st.floats(-5, 5).filter(lambda a: abs(a) > 1e-3)

# Every method of one ratio that is smooth or has no gradient through its own weight.
CLOSED_FORM = {
    "cispo": {"name": "cispo", "clip_low": 0.3, "clip_high": 0.7},
    "sapo": {"name": "sapo"},
    "simple_po": {"name": "simple_po", "epsilon": 0.3},
    "minirl": {"name": "minirl", "ratio_denominator": "rollout", "truncation": 3.0},
}


def weight_of(name: str, r: float, a: float) -> float:
    """Return w of -dloss/dlogp = A r w, as in the papers."""
    if name == "cispo":
        return min(max(r, 0.7), 1.7) / r
    if name == "sapo":
        s = 1 / (1 + math.exp(-(1.0 if a > 0 else 1.05) * (r - 1))) if r < 500 else 1.0
        return 4 * s * (1 - s)
    if name == "simple_po":
        return 1 - math.copysign(1, a) * (r - 1) / 0.3
    dropped = (a > 0 and r > 1.27) or (a < 0 and r < 0.8)
    return 0.0 if dropped else min(r, 3.0) / r


@pytest.mark.parametrize("name", CLOSED_FORM)
@given(probability, probability, advantage)
def test_the_gradient_is_minus_a_r_w_with_w_in_closed_form(name, pi, mu, a):
    r = pi / mu
    assume(min(abs(r - edge) for edge in (1.27, 0.8)) > 1e-9)
    _, weight, grad = one_token(CLOSED_FORM[name], pi, mu, a)
    w = weight_of(name, r, a)
    assert weight == pytest.approx(w, rel=1e-9, abs=1e-10)
    assert grad == pytest.approx(-a * r * w, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("name", CLOSED_FORM)
@settings(max_examples=25)
@given(probability, advantage)
def test_on_policy_the_weight_is_one_and_the_gradient_is_reinforce(name, mu, a):
    _, weight, grad = one_token(CLOSED_FORM[name], mu, mu, a)
    assert (weight, grad) == (pytest.approx(1.0), pytest.approx(-a))


@pytest.mark.parametrize("name", ["gspo", "cispo", "sapo", "simple_po"])
def test_trainer_old_takes_the_place_of_the_engine(name):
    x = batch(0, [4, 3])
    objective = make_objective({"name": name, "ratio_denominator": "trainer_old"})
    assert objective.needs == {"logold"}
    by_mu = make_objective({"name": name})(replace(x, logmu=x.logold))
    assert objective(replace(x, logmu=None)).loss.item() == by_mu.loss.item()


# GSPO


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_gspo_has_the_gradient_of_the_clipped_geometric_ratio_of_each_sequence(seed, lengths):
    low, high = 0.1, 0.2
    x = batch(seed, lengths)
    logp = x.logp.clone().requires_grad_()
    s = (((logp - x.logmu) * x.mask).sum(1) / x.mask.sum(1)).exp()
    assume(min((s.detach() - edge).abs().min() for edge in (1 - low, 1 + high)) > 1e-9)
    target = -torch.minimum(s * x.advantages, s.clamp(1 - low, 1 + high) * x.advantages).mean()
    target.backward()
    loss, grad = gradient(make_objective({"name": "gspo", "clip_low": low, "clip_high": high}), x)
    assert loss == pytest.approx(target.item(), rel=1e-12, abs=1e-13)
    torch.testing.assert_close(grad[..., 0], logp.grad, rtol=1e-10, atol=1e-13)


def test_gspo_silences_whole_sequences_beyond_the_papers_narrow_range():
    logmu = f64([[-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0]])
    logp = logmu + f64([[0.3, -0.2991], [0.3, -0.2993], [-0.3, 0.2993]])  # means 0.00045, 0.00035, -0.00035
    x = LossInputs(logp, logmu, f64([1, 1, -1]), torch.ones(3, 2))
    out = make_objective({"name": "gspo"})(x)
    assert out.weight_tok.tolist() == [[0, 0], [1, 1], [0, 0]]


# CISPO


@given(probability, probability, advantage)
def test_cispo_never_drops_a_gradient_and_bounds_its_weight(pi, mu, a):
    _, weight, grad = one_token({"name": "cispo", "clip_high": 1.5}, pi, mu, a)
    assert weight > 0
    assert grad == pytest.approx(-a * min(pi / mu, 2.5), rel=1e-9)


def test_cispo_has_a_lower_bound_only_when_asked_for_one():
    assert one_token({"name": "cispo"}, 0.001, 0.5, 1.0)[2] == pytest.approx(-0.002)
    assert one_token({"name": "cispo", "clip_low": 0.1}, 0.001, 0.5, 1.0)[2] == pytest.approx(-0.9)


def test_cispo_reports_the_shares_of_bounded_weights():
    out = make_objective({"name": "cispo", "clip_low": 0.25, "clip_high": 1.0})(worked_inputs())
    assert out.metrics["clip/high"].item() == pytest.approx(3 / 6)
    assert out.metrics["clip/low"].item() == pytest.approx(1 / 6)


# SAPO


def test_sapo_loss_and_gate_equal_the_worked_numbers():
    raw = f64([[0.1, 0.4, -0.2], [-0.6, -0.2, -2]])
    logmu = f64([[-0.2, -1, -0.5], [-0.8, -0.1, -2]])
    logp = (logmu + raw).requires_grad_()
    out = make_objective({"name": "sapo", "norm": "token_mean"})(
        LossInputs(logp, logmu, f64([1, -1]), torch.ones(2, 3))
    )
    gate = f64([[2.105074, 2.482145, 1.819225], [1.461827, 1.724038, 1.094972]])
    weight = f64([[0.997240, 0.941884, 0.991830], [0.945925, 0.990998, 0.819256]])
    torch.testing.assert_close(out.loss_tok.detach(), f64([[-1], [1]]) * gate, atol=6e-7, rtol=0)
    torch.testing.assert_close(out.weight_tok, weight, atol=6e-7, rtol=0)
    assert out.loss.item() == pytest.approx(-0.354268, abs=6e-7)


@given(probability, probability, st.floats(0.1, 5), st.floats(0.2, 3))
def test_the_gate_of_sapo_fades_on_both_sides_and_faster_with_a_larger_tau(pi, mu, tau, factor):
    r = pi / mu
    assume(1e-6 < abs(r - 1) < 20 / tau / max(factor, 1))
    near = one_token({"name": "sapo", "tau_neg": tau}, pi, mu, -1.0)[1]
    far = one_token({"name": "sapo", "tau_neg": tau * factor}, pi, mu, -1.0)[1]
    assert 0 < near <= 1
    assert (far <= near) if factor >= 1 else (far >= near)


def test_sapo_uses_tau_neg_for_negative_advantages_only():
    assert one_token({"name": "sapo", "tau_neg": 9.0}, 0.6, 0.4, 1.0) == one_token({"name": "sapo"}, 0.6, 0.4, 1.0)
    assert one_token({"name": "sapo", "tau_pos": 9.0}, 0.6, 0.4, -1.0) == one_token({"name": "sapo"}, 0.6, 0.4, -1.0)


# SimplePO


def test_simple_po_equals_the_worked_numbers():
    x = worked_inputs()
    logp = x.logp.requires_grad_()
    out = make_objective({"name": "simple_po"})(x)
    out.loss_tok.sum().backward()
    w = f64([[0, 2, -9, -0.666667], [7.25, -69, 0, 0]])
    ratio = f64([[1.2, 0.8, 3, 2 / 3], [2.25, 15, 0, 0]])
    torch.testing.assert_close(out.weight_tok, w, atol=6e-7, rtol=0)
    torch.testing.assert_close(logp.grad, -x.advantages * ratio * w, atol=6e-6, rtol=0)
    assert out.loss.item() == pytest.approx(159.287095, abs=6e-7)


@given(probability, advantage, st.floats(0.05, 0.95) | st.floats(1.05, 5))
def test_simple_po_has_its_optimum_where_the_ratio_has_moved_by_epsilon(larger, a, epsilon):
    a = abs(a) if epsilon > 1 else a  # a ratio is not negative
    r = 1 + math.copysign(1, a) * epsilon
    mu, pi = (larger / r, larger) if r > 1 else (larger, larger * r)
    assert one_token({"name": "simple_po", "epsilon": epsilon}, pi, mu, a)[1] == pytest.approx(0, abs=1e-7)


# MiniRL


@given(probability, probability, probability, advantage)
def test_minirl_weighs_by_the_engine_and_masks_by_the_trainer(pi, mu, old, a):
    moved, r = pi / old, pi / mu
    assume(min(abs(moved - edge) for edge in (1.27, 0.8)) > 1e-9)
    _, weight, grad = one_token({"name": "minirl"}, pi, mu, a, logold=old)
    kept = not ((a > 0 and moved > 1.27) or (a < 0 and moved < 0.8))
    assert (weight > 0) == kept
    assert grad == pytest.approx(-a * min(r, 5.0) * kept, rel=1e-9, abs=1e-12)


def test_minirl_needs_the_engine_with_either_denominator():
    assert make_objective({"name": "minirl"}).needs == {"logmu", "logold"}
    assert make_objective({"name": "minirl", "ratio_denominator": "rollout"}).needs == {"logmu"}


PER_SEQUENCE, SUMMED = "seq_mean_token_mean", "seq_mean_token_sum_norm"
DEFAULTS = {
    "ppo": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "norm": "token_mean"},
    "grpo": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "norm": PER_SEQUENCE},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": None, "norm": "token_mean"},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "ratio_level": "geometric", "norm": PER_SEQUENCE},
    "cispo": {"clip_low": 1.0, "clip_high": 4.0, "norm": "token_mean"},
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05, "norm": PER_SEQUENCE},
    "simple_po": {"epsilon": 0.2, "norm": "token_mean"},
    "minirl": {
        "clip_low": 0.2,
        "clip_high": 0.27,
        "truncation": 5.0,
        "ratio_denominator": "trainer_old",
        "norm": "token_mean",
    },
    "dppo_tv": {"delta": 0.15, "truncation": 20.0, "norm": SUMMED},
    "dppo_kl": {"delta": 0.05, "truncation": 20.0, "norm": SUMMED},
    "dppo_topk": {"divergence": "tv", "delta": 0.15, "top_k": 20, "truncation": 20.0, "norm": SUMMED},
    "drpo": {"delta": 12.5, "norm": SUMMED},
    "cppo": {"delta": 0.2, "w_min": 0.8, "delta_b": 0.02, "log_ratio_coef": 0, "norm": "token_mean"},
    "opd": {"log_ratio_coef": 0, "norm": "token_mean"},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_papers(name):
    objective = make_objective({"name": name})
    expected = {
        "ratio_level": "token",
        "ratio_denominator": "rollout",
        "kl_coef": 0,
        "entropy_coef": 0,
        "corrections": (),
        **DEFAULTS[name],
    }
    norm = expected.pop("norm")
    assert {key: getattr(objective, key) for key in expected} == expected
    assert objective.norm.mode == norm
