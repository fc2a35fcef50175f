"""ASymPO, ScaledPO and the naive policy gradient equal their closed forms, in float64."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from megatron_rl.errors import ConfigError
from megatron_rl.objectives import LossInputs, LossOutputs, group_advantages, make_objective
from tests.unit.objectives.specs import f64, packed, trained

NAIVE, SCALED, ASYMPO = {"name": "naive"}, {"name": "scaled_po"}, {"name": "asympo"}
BOUNDED = {"name": "asympo", "p_low": 0.02, "p_high": 0.95}

# Three responses of one prompt, rewards 1, 1, 0.
LOGP = [[-0.01, -0.30, -0.29, 0], [-0.5, -1.5, 0, 0], [-2, -4, -3, -1]]
MASK = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
REWARDS = f64([1, 1, 0])

seeds = st.integers(0, 10**6)


def worked() -> LossInputs:
    return LossInputs(f64(LOGP), None, REWARDS - REWARDS.mean(), f64(MASK))


def group(seed: int, size: int = 4, width: int = 6) -> LossInputs:
    """Return one group of zero-sum advantages.

    The mean NLLs range from 0.01 to several nats, the lengths from 1 to `width`.
    """
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (size, 1), generator=g)
    scale = torch.logspace(-2, 0.7, size, dtype=torch.float64)[torch.randperm(size, generator=g)]
    rewards = torch.randn(size, generator=g, dtype=torch.float64)
    return LossInputs(
        logp=-scale[:, None] * (0.1 + torch.rand(size, width, generator=g, dtype=torch.float64)),
        logmu=None,
        advantages=rewards - rewards.mean(),
        mask=(torch.arange(width) < lengths).double(),
    )


def run(spec: dict, x: LossInputs) -> tuple[LossOutputs, Tensor]:
    """Return the outputs, and dL/dlogp [B, T]."""
    logp = x.logp.clone().requires_grad_()
    out = make_objective(spec)(replace(x, logp=logp))
    out.loss.backward()
    assert logp.grad is not None
    return out, logp.grad


def nll(x: LossInputs, logp: Tensor | None = None) -> Tensor:
    """Return S_g [B], the mean token NLL."""
    return -((x.logp if logp is None else logp) * x.mask).sum(1) / x.mask.sum(1)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-12)


@pytest.mark.parametrize(
    ("spec", "loss", "grads"),
    [
        (NAIVE, -0.422222, (-0.037037, -0.055556, 0.055556)),
        (SCALED, 0.022222, (-0.037037, -0.055556, 0.011111)),
        (ASYMPO, 0.0, (-0.185185, -0.055556, 0.022222)),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_loss_and_gradient_equal_the_worked_numbers(spec, loss, grads):
    out, grad = run(spec, worked())
    assert out.loss.item() == pytest.approx(loss, abs=6e-7)
    torch.testing.assert_close(grad, f64(grads)[:, None] * f64(MASK), atol=6e-7, rtol=0)


def test_the_bounded_form_equals_the_worked_numbers():
    out, grad = run(BOUNDED, worked())
    expected = [[0, -0.173261, -0.173261, 0], [-0.055556, -0.055556, 0, 0], [0.022419, 0, 0.022419, 0.022419]]
    torch.testing.assert_close(grad, f64(expected), atol=6e-7, rtol=0)
    assert out.loss.item() == pytest.approx(0, abs=1e-12)
    scale = -worked().advantages / 3 / f64(MASK).sum(1) / f64([grad[0, 1], grad[1, 0], grad[2, 0]])
    torch.testing.assert_close(scale, f64([0.213764, 1, 2.478006]), atol=6e-7, rtol=0)
    assert out.metrics["asympo/clip_high"].item() == pytest.approx(1 / 9)
    assert out.metrics["asympo/clip_low"].item() == pytest.approx(1 / 9)


@pytest.mark.parametrize("spec", [NAIVE, SCALED, ASYMPO, BOUNDED], ids=["naive", "scaled_po", "asympo", "bounded"])
def test_the_log_tells_the_naive_loss_and_both_scales_whatever_the_objective(spec):
    objective = make_objective(spec)
    metrics = {name: value.item() for name, value in objective(worked()).metrics.items()}
    name = spec["name"]
    assert metrics[f"{name}/naive_loss"] == pytest.approx(-0.422222, abs=6e-7)
    expected = {"s_p": 0.6, "s_n": 2.5, "s_ratio": 4.166667}
    assert objective.summary(metrics) == {
        f"{name}/{key}": pytest.approx(value, abs=6e-7) for key, value in expected.items()
    }


def test_without_positive_advantages_there_is_no_ratio_of_scales():
    objective = make_objective(ASYMPO)
    x = replace(worked(), advantages=f64([0, 0, 0]))
    assert objective.summary({name: value.item() for name, value in objective(x).metrics.items()}) == {}


@given(seeds)
def test_the_loss_of_zero_sum_advantages_is_zero_and_both_sides_weigh_the_same(seed):
    x = group(seed)
    out, _ = run(ASYMPO, x)
    assert abs(out.loss.item()) < 1e-10
    per_sequence = out.loss_tok.detach().sum(1) / x.mask.sum(1)
    positive = x.advantages > 0
    assert per_sequence[positive].sum().item() == pytest.approx(-per_sequence[~positive].sum().item(), rel=1e-10)


@given(seeds)
def test_the_gradient_is_the_advantage_over_length_and_scale(seed):
    x = group(seed)
    _, grad = run(ASYMPO, x)
    coefficient = -x.advantages / (len(x.logp) * x.mask.sum(1) * nll(x))
    close(grad, coefficient[:, None] * x.mask)
    mass = (grad.abs() * -x.logp).sum(1)
    close(mass, x.advantages.abs() / len(x.logp))


@given(seeds)
def test_the_gap_to_the_naive_loss_is_that_of_the_two_mean_scales(seed):
    x = group(seed)
    scale, positive = nll(x), x.advantages > 0
    mass = x.advantages[positive].sum()
    mean_p = (x.advantages[positive] * scale[positive]).sum() / mass
    mean_n = (-x.advantages[~positive] * scale[~positive]).sum() / mass
    gap = run(NAIVE, x)[0].loss - run(ASYMPO, x)[0].loss
    close(gap.detach(), mass / len(scale) * (mean_p - mean_n))
    delta = (scale - scale.mean()).abs().max()
    assert gap.abs() <= 2 * mass * delta / len(scale) + 1e-12
    metrics = run(ASYMPO, x)[0].metrics
    assert make_objective(ASYMPO).summary({k: v.item() for k, v in metrics.items()})["asympo/s_ratio"] == pytest.approx(
        (mean_n / mean_p).item()
    )


@given(seeds, st.floats(0.01, 5))
def test_where_all_scales_agree_it_is_the_naive_gradient_over_that_scale(seed, scale):
    x = group(seed)
    x = replace(x, logp=x.logp * (scale / nll(x))[:, None])
    close(run(ASYMPO, x)[1], run(NAIVE, x)[1] / scale)


@given(seeds, st.floats(0.1, 10))
def test_scaling_a_response_keeps_its_term_and_divides_its_coefficient(seed, k):
    x = group(seed)
    factor = f64([k, 1, 1, 1])[:, None]
    before, grad = run(ASYMPO, x)
    after, scaled_grad = run(ASYMPO, replace(x, logp=x.logp * factor))
    close(after.loss_tok.detach(), before.loss_tok.detach())
    close(scaled_grad, grad / factor)


@given(seeds)
def test_without_the_stop_gradient_nothing_would_be_learnt(seed):
    x = group(seed)
    logp = x.logp.clone().requires_grad_()
    scale = -(logp * x.mask).sum(1, keepdim=True) / x.mask.sum(1, keepdim=True)
    with_gradient = -x.advantages[:, None] * logp / scale * x.mask
    (with_gradient.sum(1) / x.mask.sum(1)).mean().backward()
    assert logp.grad is not None
    assert logp.grad.abs().max() < 1e-12, "A S / S is a constant"
    assert run(ASYMPO, x)[1].abs().max() > 1e-6


@given(seeds, st.floats(0.01, 0.4), st.floats(0.5, 0.99))
def test_bounded_tokens_get_no_gradient_and_keep_counting(seed, p_low, p_high):
    x = group(seed)
    raised = (x.advantages >= 0)[:, None]
    outside = torch.where(raised, x.logp > math.log(p_high), x.logp < math.log(p_low))
    bounded = torch.where(raised, x.logp.clamp(max=math.log(p_high)), x.logp.clamp(min=math.log(p_low)))
    out, grad = run({**ASYMPO, "p_low": p_low, "p_high": p_high}, x)
    assert not grad[outside].any()
    coefficient = -x.advantages / (len(x.logp) * x.mask.sum(1) * nll(x, bounded))
    close(grad, coefficient[:, None] * x.mask * ~outside)
    assert abs(out.loss.item()) < 1e-10
    tokens = x.mask.sum()
    assert out.metrics["asympo/clip_high"].item() == pytest.approx(
        ((outside & raised) * x.mask).sum().item() / tokens.item()
    )
    assert out.metrics["asympo/clip_low"].item() == pytest.approx(
        ((outside & ~raised) * x.mask).sum().item() / tokens.item()
    )


@given(seeds)
def test_bounds_at_the_ends_leave_the_plain_form(seed):
    x = group(seed)
    close(run({**ASYMPO, "p_low": 1e-300, "p_high": 1.0}, x)[1], run(ASYMPO, x)[1])


@given(seeds, st.floats(0.05, 0.5), st.floats(0.0, 0.5))
def test_the_theorem_bounds_the_naive_sum_where_ratios_stay_in_a_clip_range(seed, epsilon, spread):
    """Theorem 1: |sum A S| is bounded if behavior scales lie within `spread` and ratios in 1 +- epsilon."""
    g = torch.Generator().manual_seed(seed)
    x = group(seed)
    behavior = 1 + spread * (2 * torch.rand(x.logp.shape, generator=g, dtype=torch.float64) - 1)  # NLL of every token
    ratio = 1 + epsilon * (2 * torch.rand(x.logp.shape, generator=g, dtype=torch.float64) - 1)
    x = replace(x, logp=ratio.log() - behavior)
    scale_b = nll(x, -behavior)
    delta = (scale_b - scale_b.mean()).abs().max().item()
    tau = max(math.log(1 + epsilon), -math.log(1 - epsilon))
    mass = x.advantages.relu().sum().item()
    total = abs(run(NAIVE, x)[0].loss.item()) * len(x.logp)
    assert total <= 2 * mass * (delta + tau) + 1e-12


@pytest.mark.parametrize("spec", [NAIVE, SCALED, ASYMPO, BOUNDED], ids=["naive", "scaled_po", "asympo", "bounded"])
@given(seed=seeds)
def test_behavior_log_probabilities_change_nothing(spec, seed):
    assert make_objective(spec).needs == frozenset()
    x = group(seed)
    other = replace(x, logmu=-torch.rand(x.logp.shape, dtype=torch.float64), logold=x.logp - 1)
    assert torch.equal(run(spec, other)[1], run(spec, x)[1])
    assert torch.equal(run(spec, other)[0].loss, run(spec, x)[0].loss)


@pytest.mark.parametrize("spec", [NAIVE, SCALED, ASYMPO, BOUNDED], ids=["naive", "scaled_po", "asympo", "bounded"])
def test_a_group_of_equal_rewards_is_silent_also_where_every_token_is_certain(spec):
    x = replace(group(0), logp=torch.zeros(4, 6, dtype=torch.float64), advantages=f64([0, 0, 0, 0]))
    out, grad = run(spec, x)
    assert out.loss.item() == 0
    assert not grad.any()


def test_the_floor_bounds_the_coefficient_of_a_certain_response():
    x = replace(group(0), logp=torch.full((4, 6), -1e-9, dtype=torch.float64))
    grad = run({**ASYMPO, "floor": 1e-3}, x)[1]
    close(grad, (-x.advantages / (4 * x.mask.sum(1) * 1e-3))[:, None] * x.mask)


@pytest.mark.parametrize("spec", [SCALED, ASYMPO, BOUNDED], ids=["scaled_po", "asympo", "bounded"])
@given(seed=seeds, order=st.permutations(range(4)), padding=st.integers(0, 3))
def test_packed_gives_the_gradient_of_padded(spec, seed, order, padding):
    x = group(seed)
    source = trained(x, order)
    grad = run(spec, packed(x, source, ids=[7, 5, 11, 0], padding=padding))[1]
    close(grad[0, : len(source)], run(spec, x)[1].flatten()[source])
    assert not grad[0, len(source) :].any()


@given(seeds)
def test_alpha_one_is_naive_and_alpha_zero_learns_from_positive_responses_alone(seed):
    x = group(seed)
    close(run({**SCALED, "alpha": 1.0}, x)[1], run(NAIVE, x)[1])
    assert run({**SCALED, "alpha": 1.0}, x)[0].loss.item() == pytest.approx(run(NAIVE, x)[0].loss.item(), rel=1e-12)
    grad = run({**SCALED, "alpha": 0.0}, x)[1]
    assert not grad[x.advantages < 0].any()
    assert torch.equal(grad[x.advantages > 0], run(NAIVE, x)[1][x.advantages > 0])


@given(seeds, st.floats(0, 1))
def test_the_gradient_is_linear_in_alpha_for_negatives_and_keeps_the_sign_of_the_advantage(seed, alpha):
    x = group(seed)
    grad, naive = run({**SCALED, "alpha": alpha}, x)[1], run(NAIVE, x)[1]
    scale = torch.where(x.advantages < 0, f64(alpha), f64(1))[:, None]
    close(grad, scale * naive)
    close(naive, (-x.advantages / (len(x.logp) * x.mask.sum(1)))[:, None] * x.mask)
    if alpha > 1e-9:
        assert torch.equal((-grad).sign(), x.advantages.sign()[:, None] * x.mask)


@given(seeds, st.floats(0.01, 1))
def test_the_scaled_loss_cancels_where_the_scales_differ_by_one_over_alpha(seed, alpha):
    x = group(seed)
    scale, positive = nll(x), x.advantages > 0
    mass = x.advantages[positive].sum()
    mean_p = (x.advantages[positive] * scale[positive]).sum() / mass
    mean_n = (-x.advantages[~positive] * scale[~positive]).sum() / mass
    loss = run({**SCALED, "alpha": alpha}, x)[0].loss.detach()
    close(loss, mass / len(scale) * (mean_p - alpha * mean_n))
    balanced = replace(x, logp=torch.where(positive[:, None], x.logp, x.logp * (mean_p / (alpha * mean_n))))
    assert run({**SCALED, "alpha": alpha}, balanced)[0].loss.item() == pytest.approx(0, abs=1e-9)


@given(seeds, st.floats(0, 1))
def test_scaled_coefficients_of_a_group_add_up_to_a_net_push_upwards(seed, alpha):
    x = group(seed)
    pushed = -(run({**SCALED, "alpha": alpha}, x)[1].sum(1) * len(x.logp)).sum()
    mass = x.advantages.relu().sum()
    close(pushed, (1 - alpha) * mass, tolerance=1e-9)


@given(seeds, st.floats(0.1, 1), st.floats(0.05, 3))
def test_scaled_and_asymmetric_gradients_are_parallel_where_the_scales_differ_by_one_over_alpha(seed, alpha, s_p):
    x = group(seed)
    target = torch.where(x.advantages > 0, f64(s_p), f64(s_p / alpha))
    x = replace(x, logp=x.logp * (target / nll(x))[:, None])
    close(run({**SCALED, "alpha": alpha}, x)[1], run(ASYMPO, x)[1] * s_p)


def test_an_advantage_of_zero_contributes_nothing_to_any_of_them():
    x = replace(group(3), advantages=f64([1, 0, -1, 0]))
    for spec in (NAIVE, SCALED, ASYMPO, BOUNDED):
        assert not run(spec, x)[1][[1, 3]].any()


@given(seeds)
def test_advantages_over_the_std_of_the_group_balance_as_well(seed):
    x = group(seed)
    assume(x.advantages.abs().max() > 1e-3)
    normed = group_advantages(x.advantages.numpy(), torch.zeros(4).numpy(), "grpo")
    assert abs(run(ASYMPO, replace(x, advantages=torch.from_numpy(normed).double()))[0].loss.item()) < 1e-6


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({**SCALED, "alpha": 1.1}, "alpha"),
        ({**SCALED, "alpha": -0.1}, "alpha"),
        ({**NAIVE, "alpha": 0.2}, "no key 'alpha'"),
        ({**ASYMPO, "p_low": 0.5, "p_high": 0.5}, "p_low must be the smaller"),
        ({**ASYMPO, "p_high": 1.5}, "p_high"),
        ({**ASYMPO, "floor": 0}, "floor"),
        ({**ASYMPO, "phigh": 0.9}, "did you mean 'p_high'"),
    ],
)
def test_an_illegal_option_is_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        make_objective(spec)
