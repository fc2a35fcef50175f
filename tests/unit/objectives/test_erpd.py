"""The losses of ERPD's two stages equal their closed forms, in float64."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.objectives import LossInputs, LossOutputs, make_objective
from megatron_rl.objectives.advantages import whiten_tokens
from tests.unit.objectives.specs import f64

LOGOLD = [[-0.2, -1, -0.5], [-0.8, -0.1, -2]]
LOGE = [[-0.1, -0.6, -0.7], [-1.4, -0.3, -4]]
RAW = [[0.1, 0.4, -0.2], [-0.6, -0.2, -2]]
REWARDS = [1, 0]

seeds = st.integers(0, 10**6)


def inputs(logp, **tensors) -> LossInputs:
    logp = f64(logp)
    return LossInputs(logp=logp, logmu=None, advantages=torch.zeros_like(logp), mask=torch.ones_like(logp), **tensors)


def run(spec: dict, x: LossInputs) -> tuple[LossOutputs, Tensor, Tensor]:
    """Return the outputs, d(sum of loss_tok)/dlogp and dL/dlogp, [B, T] each."""
    logp = x.logp.clone().requires_grad_()
    out = make_objective(spec)(replace(x, logp=logp))
    (per_token,) = torch.autograd.grad(out.loss_tok.sum(), logp, retain_graph=True)
    (whole,) = torch.autograd.grad(out.loss, logp)
    return out, per_token, whole


def batch(seed: int, rows: int = 3, width: int = 5) -> LossInputs:
    """Return ragged rows: random old and current log-probabilities, rewards 0 or 1."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows, 1), generator=g)
    logold = -3 * torch.rand(rows, width, generator=g, dtype=torch.float64)
    return LossInputs(
        logp=(logold + 0.5 * torch.randn(rows, width, generator=g, dtype=torch.float64)).clamp(max=0),
        logmu=None,
        advantages=torch.zeros(rows, dtype=torch.float64),
        mask=(torch.arange(width) < lengths).double(),
        logold=logold,
        rewards=torch.randint(2, (rows,), generator=g).double(),
    )


def near(found: Tensor, expected, tolerance: float = 6e-7) -> None:
    torch.testing.assert_close(found.detach(), f64(expected), atol=tolerance, rtol=0)


def test_mse_equals_the_worked_numbers():
    out, per_token, _ = run({"name": "erpd_mse"}, inputs(LOGE, rewards=f64(REWARDS)))
    assert out.loss.item() == pytest.approx(0.179335, abs=6e-7)
    near(per_token, [[-0.172213, -0.495235, -0.499977], [0.121620, 1.097623, 0.000671]])


@pytest.mark.parametrize(
    ("reduction", "implicit", "loss", "grads"),
    [
        ("sum", (0.015, -0.14), 0.655635, (-0.024813, 0.023253)),
        ("mean", (0.005, -0.046667), 0.680368, (-0.008313, 0.008139)),
    ],
)
def test_cross_entropy_equals_the_worked_numbers(reduction, implicit, loss, grads):
    x = inputs(LOGE, logold=f64(LOGOLD), rewards=f64(REWARDS))
    out, per_token, whole = run({"name": "erpd_ce", "beta": 0.05, "reduction": reduction}, x)
    assert out.loss.item() == pytest.approx(loss, abs=6e-7)
    near(per_token, f64(grads)[:, None].expand(2, 3).tolist())
    near(whole * 2, per_token.tolist(), 1e-15)
    assert out.metrics["erpd_ce/implicit_reward"].item() == pytest.approx(sum(implicit) / 2, abs=6e-7)
    assert out.metrics["erpd_ce/accuracy"].item() == 1.0


def test_distillation_equals_the_worked_numbers():
    raw = f64(LOGE) - f64(LOGOLD)
    near(raw, RAW)
    advantages = torch.from_numpy(whiten_tokens(raw.flatten().numpy(), torch.ones(6).numpy())).view(2, 3)
    near(advantages, [[0.611593, 0.966712, 0.256475], [-0.217017, 0.256475, -1.874238]])
    logp = [[-0.15, -0.7, -0.55], [-1.1, -0.15, -2.6]]
    x = replace(inputs(logp, logold=f64(LOGOLD)), advantages=advantages)
    out, per_token, _ = run({"name": "erpd_distill"}, x)
    near((x.logp - f64(LOGOLD)).exp(), [[1.051271, 1.349859, 0.951229], [0.740818, 0.951229, 0.548812]])
    near(out.loss_tok, [[-0.642950, -1.160054, -0.243966], [0.173614, -0.243966, 1.499390]])
    assert out.loss.item() == pytest.approx(-0.102989, abs=6e-7)
    near(per_token, [[-0.642950, 0, -0.243966], [0, -0.243966, 0]])


def test_sapo_on_the_teachers_signal_equals_the_worked_numbers():
    x = replace(inputs(LOGE), logmu=f64(LOGOLD), advantages=f64([1, -1]))
    out, per_token, _ = run({"name": "sapo", "norm": "token_mean"}, x)
    ratio = f64(RAW).exp()
    weight = [[0.997240, 0.941884, 0.991830], [0.945925, 0.990998, 0.819256]]
    near(-out.loss_tok * f64([[1], [-1]]), [[2.105074, 2.482145, 1.819225], [1.461827, 1.724038, 1.094972]])
    near(out.weight_tok, weight)
    near(per_token, (-f64([[1], [-1]]) * ratio * f64(weight)).tolist(), 3e-6)
    assert out.loss.item() == pytest.approx(-0.354268, abs=6e-7)


@given(seeds, st.floats(0.1, 3))
def test_the_gradient_of_mse_is_twice_the_error_times_the_probability(seed, negative_weight):
    x = batch(seed)
    _, per_token, _ = run({"name": "erpd_mse", "negative_weight": negative_weight}, x)
    pi, reward = x.logp.exp(), x.rewards[:, None]
    weight = torch.where(reward < 0.5, f64(negative_weight), f64(1))
    torch.testing.assert_close(per_token, 2 * weight * (pi - reward) * pi * x.mask, rtol=1e-10, atol=1e-14)


def test_mse_is_flat_where_the_probability_is_the_reward_and_where_it_vanishes():
    def slope(logp: float, reward: float) -> float:
        return run({"name": "erpd_mse"}, inputs([[logp]], rewards=f64([reward])))[1].item()

    assert slope(0.0, 1.0) == 0
    assert slope(-800.0, 0.0) == 0
    assert slope(math.log(1e-3), 0.0) == pytest.approx(2e-6)  # the gradient of negatives decreases as pi squared
    # The gradient of an unlikely token of a positive is small.
    assert slope(math.log(1e-6), 1.0) == pytest.approx(-2e-6, rel=1e-5)


def test_the_log_of_mse_tells_the_mean_probability_on_each_side():
    objective = make_objective({"name": "erpd_mse"})
    x = replace(inputs(LOGE, rewards=f64(REWARDS)), mask=f64([[1, 1, 0], [1, 1, 1]]))
    summary = objective.summary({name: value.item() for name, value in objective(x).metrics.items()})
    pi = f64(LOGE).exp()
    assert summary["erpd_mse/pi_positive"] == pytest.approx(pi[0, :2].mean().item())
    assert summary["erpd_mse/pi_negative"] == pytest.approx(pi[1].mean().item())
    one_sided = objective(replace(x, rewards=f64([1, 1])))
    assert "erpd_mse/pi_negative" not in objective.summary({k: v.item() for k, v in one_sided.metrics.items()})


@given(seeds, st.floats(0.001, 2), st.sampled_from(["sum", "mean"]))
def test_cross_entropy_is_the_mean_over_sequences_with_its_closed_gradient(seed, beta, reduction):
    x = batch(seed)
    out, per_token, whole = run({"name": "erpd_ce", "beta": beta, "reduction": reduction}, x)
    length = x.mask.sum(1)
    scale = torch.ones_like(length) if reduction == "sum" else length
    implicit = beta * ((x.logp - x.logold) * x.mask).sum(1) / scale
    loss = -(x.rewards * implicit.sigmoid().log() + (1 - x.rewards) * (1 - implicit.sigmoid()).log())
    coefficient = -beta * (x.rewards - implicit.sigmoid()) / scale
    torch.testing.assert_close(out.loss.detach(), loss.mean(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(per_token, coefficient[:, None] * x.mask, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(whole, per_token / len(length), rtol=1e-12, atol=1e-15)


@given(seeds, st.floats(0.001, 2))
def test_cross_entropy_starts_at_log_two_with_half_beta_a_token(seed, beta):
    x = batch(seed)
    out, per_token, _ = run({"name": "erpd_ce", "beta": beta}, replace(x, logp=x.logold))
    assert out.loss.item() == pytest.approx(math.log(2), rel=1e-12)
    sign = torch.where(x.rewards > 0.5, f64(-1), f64(1))
    torch.testing.assert_close(per_token, sign[:, None] * beta / 2 * x.mask, rtol=1e-12, atol=0)
    mean = run({"name": "erpd_ce", "beta": beta, "reduction": "mean"}, replace(x, logp=x.logold))[1]
    torch.testing.assert_close(mean * x.mask.sum(1, keepdim=True), per_token, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("reward", "shift"), [(1.0, 15.0), (0.0, -15.0)])
def test_cross_entropy_saturates_once_the_answer_is_given(reward, shift):
    right = inputs([[-20 + shift] * 3], logold=f64([[-20.0] * 3]), rewards=f64([reward]))
    out, per_token, _ = run({"name": "erpd_ce", "beta": 1.0}, right)
    assert 0 <= out.loss.item() < 1e-15
    assert per_token.abs().max() < 1e-15
    wrong, per_token, _ = run({"name": "erpd_ce", "beta": 1.0}, replace(right, rewards=1 - right.rewards))
    assert wrong.loss.item() == pytest.approx(45, rel=1e-12)
    near(per_token.abs(), [[1.0, 1.0, 1.0]], 1e-12)


@given(seeds)
def test_distillation_from_the_old_policy_pushes_every_token_by_its_advantage(seed):
    x = batch(seed)
    keep = x.mask.flatten().numpy()
    raw = torch.randn(x.logp.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    advantages = torch.from_numpy(whiten_tokens(raw.flatten().numpy(), keep)).view_as(raw)
    out, per_token, whole = run({"name": "erpd_distill"}, replace(x, logp=x.logold, advantages=advantages))
    assert out.loss.item() == pytest.approx(0, abs=1e-10), "whitened advantages have mean 0"
    torch.testing.assert_close(per_token, -advantages, rtol=1e-12, atol=0)
    torch.testing.assert_close(whole, -advantages / x.mask.sum(), rtol=1e-12, atol=0)
    assert out.metrics["clip/high"].item() == out.metrics["clip/low"].item() == 0


@given(st.floats(0.5, 2), st.floats(-2, 2).filter(lambda a: abs(a) > 1e-3), st.floats(0.05, 0.5), st.floats(0.05, 0.5))
def test_distillation_is_flat_exactly_where_the_clip_holds(ratio, advantage, low, high):
    x = replace(inputs([[-1 + math.log(ratio)]], logold=f64([[-1.0]])), advantages=f64([[advantage]]))
    _, per_token, _ = run({"name": "erpd_distill", "clip_low": low, "clip_high": high}, x)
    r = (x.logp + 1).exp().item()
    flat = (advantage > 0 and r > 1 + high) or (advantage < 0 and r < 1 - low)
    assert (per_token.item() == 0) == flat


def test_a_teacher_that_is_its_own_denominator_teaches_nothing():
    raw = f64(LOGE) - f64(LOGE)
    advantages = torch.from_numpy(whiten_tokens(raw.flatten().numpy(), torch.ones(6).numpy())).view(2, 3)
    x = replace(inputs(LOGOLD, logold=f64(LOGE)), advantages=advantages)
    out, per_token, _ = run({"name": "erpd_distill"}, x)
    assert out.loss.item() == 0
    assert not per_token.any()


def test_in_expectation_the_signal_is_the_gradient_of_the_divergence_to_the_teacher():
    """At pi_old, grad E_old[r log(pi_e / pi_old)] equals -grad KL(pi | pi_e).

    The vocabulary is small enough to sum over.
    """
    g = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 7, dtype=torch.float64, generator=g)
    logits.requires_grad_()
    logp, loge = logits.log_softmax(-1), teacher.log_softmax(-1)
    old = logp.detach()
    # Every token occurs once. The advantage contains its probability under the old policy: the loss is linear in the
    # advantage inside the clip.
    x = LossInputs(logp[None], None, (old.exp() * (loge - old))[None], torch.ones(1, 7), logold=old[None])
    surrogate = -make_objective({"name": "erpd_distill"})(x).loss_tok.sum()
    (found,) = torch.autograd.grad(surrogate, logits, retain_graph=True)
    divergence = (logp.exp() * (logp - loge)).sum()
    (expected,) = torch.autograd.grad(-divergence, logits)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@given(seeds)
def test_on_policy_the_gate_of_sapo_is_the_plain_policy_gradient(seed):
    x = batch(seed)
    advantages = torch.randn(len(x.logp), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    out, per_token, _ = run({"name": "sapo"}, replace(x, logmu=x.logp, advantages=advantages))
    torch.testing.assert_close(out.weight_tok, x.mask)
    torch.testing.assert_close(per_token, -advantages[:, None] * x.mask, rtol=1e-10, atol=0)


def test_the_stages_ask_for_what_they_use_and_no_more():
    needs = {name: make_objective({"name": name}).needs for name in ("erpd_mse", "erpd_ce", "erpd_distill")}
    assert needs == {"erpd_mse": {"rewards"}, "erpd_ce": {"rewards", "logold"}, "erpd_distill": {"logold"}}
    with pytest.raises(UserError, match="erpd_ce needs 'logold'"):
        make_objective({"name": "erpd_ce"})(inputs(LOGE, rewards=f64(REWARDS)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "erpd_ce", "beta": 0}, "beta"),
        ({"name": "erpd_ce", "reduction": "men"}, "did you mean 'mean'"),
        ({"name": "erpd_mse", "negative_weight": -1}, "negative_weight"),
        ({"name": "erpd_distill", "clip": 0.2}, "did you mean 'clip_"),
    ],
)
def test_an_illegal_option_is_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        make_objective(spec)


@pytest.mark.parametrize("name", ["erpd_mse", "erpd_ce"])
@pytest.mark.parametrize("reward", [-0.1, 7.0])
def test_a_reward_that_is_no_probability_is_refused(name, reward):
    x = inputs(LOGE, rewards=f64([reward, 0]), logold=f64(LOGOLD))
    with pytest.raises(UserError, match=f"{name} needs them in"):
        make_objective({"name": name})(x)
