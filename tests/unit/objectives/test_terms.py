"""Every objective can add KL and entropy terms."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.objectives import LossInputs, make_objective
from tests.unit.objectives.specs import MODES, batch, every_objective, f64, gradient

ESTIMATES = {"k1": [0.5, -0.2], "k2": [0.125, 0.02], "k3": [0.106531, 0.021403]}  # at logp - logref = 0.5 and -0.2


@pytest.mark.parametrize("kl", ESTIMATES)
def test_estimates_of_the_divergence_equal_the_worked_numbers(kl):
    logp = f64([[-1.0, -2.0]])
    x = LossInputs(logp, None, f64([0]), torch.ones(1, 2), logold=logp, logref=logp - f64([[0.5, -0.2]]))
    out = make_objective({"name": "ppo", "ratio_denominator": "trainer_old", "kl_coef": 3.0, "kl_estimator": kl})(x)
    assert out.metrics["kl_ref"].item() == pytest.approx(sum(ESTIMATES[kl]) / 2, abs=6e-7)
    assert out.loss.item() == pytest.approx(3 * sum(ESTIMATES[kl]) / 2, abs=2e-6)
    assert not out.loss_tok.any(), "loss_tok is the method's own"


@pytest.mark.parametrize(
    ("kl", "slope"), [("k1", lambda x: 1 + 0 * x), ("k2", lambda x: -x), ("k3", lambda x: 1 - x.exp())]
)
@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), mode=st.sampled_from(MODES))
def test_the_gradient_of_the_term_is_added_under_the_same_norm(kl, slope, seed, mode):
    x = batch(seed, [4, 2])
    spec = {"name": "drpo", "norm": mode}
    plain, both = (gradient(make_objective({**spec, **more}), x) for more in ({}, {"kl_coef": 0.3, "kl_estimator": kl}))
    # The weights that the norm applies in its sum: the gradient of -A r at r = 1 and A = -1.
    share = gradient(make_objective({"name": "ppo", "norm": mode}), replace(x, logmu=x.logp, advantages=f64([-1, -1])))[
        1
    ]
    torch.testing.assert_close((both[1] - plain[1])[..., 0], 0.3 * slope(x.logref - x.logp) * share[..., 0])


@every_objective
def test_terms_are_added_to_every_objective(spec):
    x = batch(1, [4, 2])
    plain, _ = gradient(spec.make(norm="token_mean"), x)
    loss, grad = gradient(spec.make(norm="token_mean", kl_coef=0.5, kl_estimator="k1", entropy_coef=0.25), x)
    keep = x.mask.bool()
    assert loss == pytest.approx(
        plain + 0.5 * (x.logp - x.logref)[keep].mean().item() - 0.25 * x.entropy[keep].mean().item()
    )
    torch.testing.assert_close(grad[..., 1], -0.25 * x.mask / 6)


@every_objective
def test_the_tensors_of_a_term_are_needed_exactly_when_its_coefficient_is_not_zero(spec):
    base = spec.make().needs
    teacher = spec.options["name"] == "opd"  # it needs the reference itself
    assert base & {"logref", "entropy"} == ({"logref"} if teacher else set())
    assert spec.make(kl_coef=0.1).needs == base | {"logref"}
    assert spec.make(entropy_coef=0.1).needs == base | {"entropy"}
    x = batch(2, [3, 1])
    for name, coef in [("logref", "kl_coef")] * (not teacher) + [("entropy", "entropy_coef")]:
        missing = replace(x, **{name: None})
        spoiled = replace(x, **{name: torch.full_like(x.logp, float("nan"))})
        assert spec.make()(missing).loss.item() == spec.make()(spoiled).loss.item() == spec.make()(x).loss.item()
        with pytest.raises(UserError, match=f"needs '{name}'"):
            spec.make(**{coef: 0.1})(missing)
        with pytest.raises(UserError, match=rf"{name}\[0, 0\] is nan"):
            spec.make(**{coef: 0.1})(spoiled)


@pytest.mark.parametrize("kl", ESTIMATES)
def test_a_reference_far_away_leaves_the_term_finite(kl):
    x = LossInputs(
        torch.zeros(1, 1), None, torch.zeros(1), torch.ones(1, 1), torch.zeros(1, 1), logref=torch.full((1, 1), 1e4)
    )
    spec = {"name": "ppo", "ratio_denominator": "trainer_old", "kl_estimator": kl, "kl_coef": 1.0}
    assert make_objective(spec)(x).loss.isfinite()


@settings(max_examples=25)
@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_k1_and_k3_are_unbiased_under_the_current_policy(logits, reference):
    logp, logref = f64([logits]).log_softmax(-1), f64([reference]).log_softmax(-1)
    exact = (logp.exp() * (logp - logref)).sum().item()
    for kl in ("k1", "k3"):
        objective = make_objective({"name": "ppo", "kl_estimator": kl, "kl_coef": 1.0, "norm": "token_mean"})
        estimates = [
            objective(LossInputs(logp[:, [i]], logp[:, [i]], f64([0]), torch.ones(1, 1), logref=logref[:, [i]])).loss
            for i in range(3)
        ]
        assert (torch.stack(estimates) * logp[0].exp()).sum().item() == pytest.approx(exact, abs=1e-10)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kl_coef": -0.1}, "'kl_coef' is -0.1"),
        ({"entropy_coef": float("nan")}, "'entropy_coef' is nan"),
        ({"kl_estimator": "k4"}, "'kl_estimator' is 'k4'"),
        ({"kl_coef": "0.1"}, "'kl_coef' is '0.1'"),
    ],
)
def test_an_illegal_coefficient_or_estimator_is_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        make_objective({"name": "drpo", **keys})
