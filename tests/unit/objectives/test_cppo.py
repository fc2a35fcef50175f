"""CPPO and the squared log-ratio equal their closed forms, in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.errors import ConfigError
from megatron_rl.objectives import LossInputs, make_objective
from tests.unit.objectives.specs import batch, f64, gradient, one_token, worked_inputs


def test_mask_loss_and_gradient_equal_the_worked_numbers():
    """Token 4: Z = 0.8 x 0.3 > 0.2 - 0.210667 + 0.04 x 2.8. Token 6 is over what token 5 left: 0.2 + 0.04 - 0.25."""
    logp = worked_inputs().logp.clone().requires_grad_()
    out = make_objective({"name": "cppo"})(worked_inputs(logp))
    out.loss_tok.sum().backward()
    torch.testing.assert_close(out.weight_tok, f64([[1, 1, 1, 0], [1, 0, 0, 0]]))
    torch.testing.assert_close(out.loss_tok.detach(), f64([[-1.2, -0.8, -1.5, 0], [1.125, 0, 0, 0]]))
    torch.testing.assert_close(logp.grad, out.loss_tok.detach())
    assert out.loss.item() == pytest.approx(-2.375 / 6)
    metrics = {name: value.item() for name, value in out.metrics.items()}
    assert metrics["cppo/budget"] == pytest.approx(0.04) and metrics["divergence"] == pytest.approx(1.05 / 6)
    assert (metrics["mask/high"], metrics["mask/low"], metrics["cppo/prefix"]) == pytest.approx((1 / 6, 1 / 6, 0))


def kept(pi: list[float], mu: list[float], a: float, delta: float, w_min: float, delta_b: float) -> list[bool]:
    """Return which tokens of one response Eq. 8-10 and 22 keep, one token after the other."""
    distances = [abs(p - m) for p, m in zip(pi, mu, strict=True)]
    b = min(max(float(np.quantile(distances, 0.9)), delta_b), 2 * delta_b)
    keep, spent, weight = [], 0.0, 0.0
    for t, (p, m) in enumerate(zip(pi, mu, strict=True)):
        w = 1.0 if len(pi) == 1 else w_min + (1 - w_min) * (len(pi) - 1 - t) / (len(pi) - 1)
        keep.append(a * (p / m - 1) <= 0 or w * distances[t] <= min(delta, delta + b * weight - spent))
        spent, weight = spent + w * distances[t], weight + w
    return keep


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    delta=st.floats(0.02, 0.5),
    w_min=st.floats(0.05, 1.0),
    delta_b=st.floats(0, 0.2),
    hole=st.booleans(),
)
def test_the_mask_is_that_of_the_paper_token_by_token(seed, lengths, delta, w_min, delta_b, hole):
    x = batch(seed, lengths)
    if hole:  # a tool's output inside the response is no token of the policy
        x.mask[0, 0] = 0 if lengths[0] > 1 else 1
    out = make_objective({"name": "cppo", "delta": delta, "w_min": w_min, "delta_b": delta_b})(x)
    for row, keep in enumerate(x.mask > 0):
        pi, mu = x.logp[row, keep].exp().tolist(), x.logmu[row, keep].exp().tolist()
        wanted = kept(pi, mu, x.advantages[row].item(), delta, w_min, delta_b)
        assert (out.weight_tok[row, keep] > 0).tolist() == wanted


def test_with_equal_weights_and_an_endless_budget_the_mask_is_that_of_dppo():
    x = batch(3, [9, 7, 5])
    cppo = make_objective({"name": "cppo", "delta": 0.1, "w_min": 1.0, "delta_b": 1e6})(x)
    dppo = make_objective({"name": "dppo_tv", "delta": 0.1, "truncation": 1e9, "norm": "token_mean"})(x)
    torch.testing.assert_close(cppo.weight_tok, dppo.weight_tok)
    assert (cppo.weight_tok[x.mask > 0] == 0).sum() > 0
    tight = make_objective({"name": "cppo", "delta": 0.1, "w_min": 1.0, "delta_b": 0.0})(x)
    assert tight.weight_tok.sum() < cppo.weight_tok.sum(), "the budget must be what masks more"
    assert tight.metrics["cppo/prefix"] > 0


@pytest.mark.parametrize(
    "option", [{"delta": 0}, {"w_min": 0}, {"w_min": 1.1}, {"delta_b": -1}, {"log_ratio_coef": -1}]
)
def test_illegal_options_are_refused(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        make_objective({"name": "cppo", **option})


@pytest.mark.parametrize("name", ["cppo", "drpo", "ppo", "dppo_tv"])
@settings(max_examples=10)
@given(pi=st.floats(1e-4, 0.999), mu=st.floats(1e-4, 0.999), a=st.floats(-3, 3))
def test_the_squared_log_ratio_adds_its_closed_gradient_to_any_ratio_objective(name, pi, mu, a):
    logs = [f64([[value]]).log() for value in (pi, mu)]
    x = LossInputs(*logs, f64([a]), f64([[1]]))
    plain, both = (gradient(make_objective({"name": name, **more}), x) for more in ({}, {"log_ratio_coef": 0.05}))
    assert both[0] - plain[0] == pytest.approx(0.05 * math.log(pi / mu) ** 2, abs=1e-9 * (1 + abs(plain[0])))
    added = (both[1] - plain[1])[0, 0, 0].item()
    assert added == pytest.approx(0.1 * math.log(pi / mu), abs=1e-9 * (1 + plain[1].abs().max().item()))


def test_the_squared_log_ratio_is_reported_and_leaves_the_methods_own_loss_alone():
    out = make_objective({"name": "drpo", "log_ratio_coef": 2.0, "norm": "token_mean"})(worked_inputs())
    plain = make_objective({"name": "drpo", "norm": "token_mean"})(worked_inputs())
    square = sum(math.log(r) ** 2 for r in (1.2, 0.8, 3, 2 / 3, 2.25, 15)) / 6
    assert out.metrics["log_ratio/square"].item() == pytest.approx(square)
    assert (out.loss - plain.loss).item() == pytest.approx(2 * square)
    assert torch.equal(out.loss_tok, plain.loss_tok)
    assert one_token({"name": "drpo", "log_ratio_coef": 2.0}, 0.3, 0.3, 1.0)[1] == 1
