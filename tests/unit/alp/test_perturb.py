"""The perturbation of a hidden state: its gradients, the tensors that it saves, and the properties in the paper."""

import math

import pytest
import torch

from megatron_rl.alp import perturb
from megatron_rl.alp.noise import NoiseRows, noise_key, normals
from megatron_rl.alp.perturb import Perturb
from megatron_rl.objectives import LossInputs, LossNorm, make_objective

HIDDEN, TOKENS = 16, 300
KEY = noise_key(1, 2, 3)


def rows(count=TOKENS):
    return NoiseRows(torch.arange(count) % 70, torch.arange(count) // 70)


def log_of(sigma, dtype=torch.float32):
    return torch.full((1,), math.log(sigma), dtype=dtype, requires_grad=True)


@pytest.fixture
def head():
    """Return a function from hidden [n, HIDDEN] to the log-probabilities [n] of one token, in float64."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(11, HIDDEN, dtype=torch.float64, generator=generator)
    return lambda hidden: torch.log_softmax(hidden @ weight.T, -1)[:, 4]


def hidden_states(count=TOKENS, scale=1.0):
    generator = torch.Generator().manual_seed(7)
    return scale * torch.randn(count, 1, HIDDEN, dtype=torch.float64, generator=generator)


def test_it_adds_sigma_times_the_noise_of_the_rows():
    h = hidden_states()
    out = Perturb.apply(h, log_of(0.3, torch.float64), rows(), KEY)
    torch.testing.assert_close(out[:, 0], h[:, 0] + 0.3 * normals(rows(), KEY, HIDDEN).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_added_to_in_float32_and_rounded_once(dtype):
    h = hidden_states().to(dtype)
    out = Perturb.apply(h, log_of(0.3), rows(), KEY)
    eps = normals(rows(), KEY, HIDDEN)[:, None]
    assert out.dtype == dtype
    wide = h.float() + log_of(0.3).exp().detach() * eps
    half_step = torch.finfo(dtype).eps / 2
    assert ((out.float() - wide).abs() <= half_step * wide.abs() * 1.001 + 1e-7).all()
    twice = (h + (0.3 * eps).to(dtype)).to(dtype)
    assert not torch.equal(out, twice)


@pytest.mark.parametrize("sigma", [1e-4, 0.1, 1.0])
def test_gradients_are_those_of_central_differences(head, sigma):
    h, log_sigma = hidden_states().requires_grad_(), log_of(sigma, torch.float64)

    def loss(hidden, scale):
        return (head(Perturb.apply(hidden, scale, rows(), KEY)[:, 0]) * torch.linspace(-1, 2, TOKENS)).sum()

    loss(h, log_sigma).backward()
    with torch.no_grad():
        step = 1e-4
        found = (loss(h, log_sigma + step) - loss(h, log_sigma - step)) / (2 * step)
        assert log_sigma.grad.item() == pytest.approx(found.item(), rel=1e-3)
        at = torch.zeros_like(h)
        at[17, 0, 5] = step
        found = (loss(h + at, log_sigma) - loss(h - at, log_sigma)) / (2 * step)
        assert h.grad[17, 0, 5].item() == pytest.approx(found.item(), rel=1e-6)


def test_the_gradient_of_log_sigma_is_the_gradient_of_the_input_times_the_noise(head):
    h, log_sigma = hidden_states().requires_grad_(), log_of(0.2, torch.float64)
    head(Perturb.apply(h, log_sigma, rows(), KEY)[:, 0]).sum().backward()
    expected = (h.grad[:, 0] * 0.2 * normals(rows(), KEY, HIDDEN)).sum()
    assert log_sigma.grad.item() == pytest.approx(expected.item(), rel=1e-9)


def test_it_keeps_nothing_of_the_size_of_the_hidden_state():
    kept = []
    h = hidden_states().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        Perturb.apply(h, log_of(0.2), rows(), KEY)
    assert kept == [1]


def test_a_fixed_sigma_costs_no_noise_in_backward(monkeypatch):
    h = hidden_states().requires_grad_()
    out = Perturb.apply(h, log_of(0.2).detach(), rows(), KEY)
    monkeypatch.setattr(perturb, "normal_chunks", None)
    out.sum().backward()
    assert torch.equal(h.grad, torch.ones_like(h))


def test_rows_that_are_not_those_of_the_hidden_state_are_refused():
    with pytest.raises(ValueError, match="300 rows of hidden state, but 299 names of tokens"):
        Perturb.apply(hidden_states(), log_of(0.2), rows(299), KEY)


def test_the_worked_perturbation_of_a_linear_policy(monkeypatch):
    """The expected numbers are computed by hand for one token, two hidden units and three actions."""
    eps = torch.tensor([[0.5, -1.2, 0.0, 0.0]])
    monkeypatch.setattr(perturb, "normal_chunks", lambda *_: iter([(slice(0, 1), eps)]))
    weight = torch.tensor([[1.0, -0.5], [0.2, 0.3], [-0.7, 0.9]], dtype=torch.float64)
    weight = torch.cat([weight, torch.zeros(3, 2, dtype=torch.float64)], 1)
    h = torch.tensor([[0.8, -0.4, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    log_sigma = log_of(0.1, torch.float64)
    clean = torch.log_softmax(h @ weight.T, -1)[0]
    noisy = torch.log_softmax(Perturb.apply(h, log_sigma, rows(1), KEY) @ weight.T, -1)[0]
    torch.testing.assert_close(clean.tolist(), [-0.424941, -1.384941, -2.344941], rtol=0, atol=1e-6)
    torch.testing.assert_close(noisy.tolist(), [-0.370211, -1.466211, -2.543211], rtol=0, atol=1e-6)
    logmu = torch.full((1, 1), math.log(0.5), dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)

    def loss(logp):
        inputs = LossInputs(logp=logp[None, None], logmu=logmu, advantages=one, mask=one)
        return make_objective({"name": "ppo", "clip_low": 1.0, "clip_high": 10.0, "norm": "token_mean"})(inputs).loss

    assert loss(clean[0]).item() == pytest.approx(-1.307617, abs=1e-6)
    total = loss(noisy[0])
    total.backward()
    assert total.item() == pytest.approx(-1.381177, abs=1e-6)
    torch.testing.assert_close(h.grad[0, :2].tolist(), [-0.439603, 0.407029], rtol=0, atol=1e-6)
    assert log_sigma.grad.item() == pytest.approx(-0.070824, abs=1e-6)


@pytest.mark.parametrize(
    ("distance", "trained", "learns"),
    [(5, 1, False), (0, 0, False), (0, 1, True)],
    ids=["clipped", "masked", "neither"],
)
def test_a_batch_that_is_clipped_or_masked_altogether_gives_sigma_no_gradient(head, distance, trained, learns):
    log_sigma = log_of(0.2, torch.float64)
    logp = head(Perturb.apply(hidden_states(), log_sigma, rows(), KEY)[:, 0])[None]
    one, norm = torch.ones_like(logp), LossNorm("token_mean", tokens=TOKENS)  # a micro-batch may train nothing
    inputs = LossInputs(logp=logp, logmu=logp.detach() - distance, advantages=one, mask=trained * one, norm=norm)
    make_objective({"name": "ppo"})(inputs).loss.backward()
    assert (log_sigma.grad.item() != 0) == learns


def test_stein_identity_of_the_perturbed_policy(head):
    """grad log E pi(a | h + sigma eps) = E_q[sigma eps] / sigma^2, q ~ pi(a | h + sigma eps) phi(eps).

    The identity is from arXiv 2603.19470. Both sides are estimated from different draws. They must agree within five
    standard errors of the difference.
    """
    sigma, draws = 0.3, 400_000
    h = hidden_states(1)[0]

    def sample(first):
        names = NoiseRows(torch.arange(draws), torch.full((draws,), first))
        noise = normals(names, KEY, HIDDEN).double()
        moved = (h + sigma * noise).requires_grad_()
        p = head(moved).exp()
        (grad,) = torch.autograd.grad(p.sum(), moved)
        return noise, p.detach(), grad

    (_, p, grad), (noise, q, _) = sample(1), sample(2)
    left, right = grad.mean(0) / p.mean(), (noise * q[:, None]).mean(0) / q.mean() / sigma
    errors = [((x - m * w[:, None]).std(0) / w.mean()) / math.sqrt(draws) for x, m, w in
              ((grad, left, p), (noise * q[:, None] / sigma, right, q))]  # fmt: skip
    assert ((left - right).abs() < 5 * (errors[0] ** 2 + errors[1] ** 2).sqrt()).all()
    assert (left.abs() > 5 * errors[0]).any(), "the estimate is all noise"


@pytest.mark.parametrize("sigma", [0.1, 0.3])
def test_the_mean_log_probability_under_noise_lies_below_the_log_of_the_mean(head, sigma):
    """Jensen's inequality holds: E log pi(a | h + sigma eps) <= log E pi.

    The gap is more than five standard errors of the two estimates. For small noise it is half the variance, to 20 %.
    """
    draws = 200_000
    h = hidden_states(1)[0]
    noise = [normals(NoiseRows(torch.arange(draws), torch.full((draws,), n)), KEY, HIDDEN).double() for n in (1, 2)]
    logp, p = head(h + sigma * noise[0]), head(h + sigma * noise[1]).exp()
    gap = p.mean().log() - logp.mean()
    error = math.sqrt((logp.var() + p.var() / p.mean() ** 2) / draws)
    assert gap > 5 * error
    if sigma == 0.1:
        assert abs(gap / (logp.var() / 2) - 1) < 0.2 + 5 * error / gap


def test_the_variance_of_log_probabilities_under_small_noise_is_that_of_the_delta_method(head):
    """Var log pi(h + sigma eps) ~ sigma^2 |grad log pi(h)|^2, within five standard errors plus second-order terms."""
    sigma, draws = 1e-3, 40_000
    h = hidden_states(1)[0].requires_grad_()
    (grad,) = torch.autograd.grad(head(h).sum(), h)
    names = NoiseRows(torch.arange(draws), torch.zeros(draws, dtype=torch.long))
    with torch.no_grad():
        logp = head(Perturb.apply(h.expand(draws, HIDDEN), log_of(sigma, torch.float64), names, KEY))
    expected = sigma**2 * grad.square().sum()
    assert abs(logp.var() / expected - 1) < 5 * math.sqrt(2 / draws) + 10 * sigma
