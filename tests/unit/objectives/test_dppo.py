"""DPPO masks the tokens whose divergence exceeds its bound, and keeps the truncated ratio of the others."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_rl.errors import ConfigError
from megatron_rl.objectives import LossInputs, make_objective
from tests.unit.objectives.specs import batch, f64, one_token, worked_inputs

probability = st.floats(1e-6, 1 - 1e-6)
advantage = st.floats(-5, 5).filter(lambda a: abs(a) > 1e-3)
deltas = st.floats(0.01, 0.9)


def tv(p: float, q: float) -> float:
    return abs(p - q)


def kl(p: float, q: float) -> float:
    """Return the binary KL of the current probability p from the previous one q."""
    return q * math.log(q / p) + (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8))


DIVERGENCES = {"dppo_tv": tv, "dppo_kl": kl}
binary = pytest.mark.parametrize("name", DIVERGENCES)


def test_masks_and_gradients_equal_the_worked_numbers():
    x = worked_inputs()
    logp = x.logp.requires_grad_()
    out = make_objective({"name": "dppo_tv", "delta": 0.15})(x)
    out.loss_tok.sum().backward()
    assert out.weight_tok.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    torch.testing.assert_close(logp.grad, f64([[-1.2, -0.8, -1.5, 0], [1.125, 0, 0, 0]]), atol=1e-12, rtol=0)
    shares = {
        "mask/high": 1 / 6,
        "mask/low": 1 / 6,
        "weight/truncated": 0,
        "divergence": (0.1 + 0.1 + 0.02 + 0.3 + 0.25 + 0.28) / 6,
    }
    assert {name: out.metrics[name].item() for name in shares} == pytest.approx(shares)


@binary
@given(probability, probability, advantage, deltas, st.floats(0.5, 50))
def test_the_gradient_is_the_truncated_ratio_of_what_the_mask_keeps(name, pi, mu, a, delta, truncation):
    distance = DIVERGENCES[name](pi, mu)
    assume(abs(distance - delta) > 1e-9 and abs(pi - mu) > 1e-12)
    _, weight, grad = one_token({"name": name, "delta": delta, "truncation": truncation}, pi, mu, a)
    kept = not (distance > delta and a * (pi - mu) > 0)
    r = pi / mu
    assert grad == pytest.approx(-a * min(r, truncation) * kept, rel=1e-9, abs=1e-12)
    assert weight == pytest.approx(min(r, truncation) / r * kept, rel=1e-9)


@binary
@given(probability, probability, probability, advantage)
def test_trainer_old_moves_the_mask_and_leaves_the_ratio(name, pi, mu, old, a):
    distance, delta = DIVERGENCES[name](pi, old), 0.1
    assume(abs(distance - delta) > 1e-9 and abs(pi - old) > 1e-12)
    spec = {"name": name, "delta": delta, "ratio_denominator": "trainer_old", "truncation": 1e9}
    kept = not (distance > delta and a * (pi - old) > 0)
    assert one_token(spec, pi, mu, a, logold=old)[2] == pytest.approx(-a * pi / mu * kept, rel=1e-9)


def test_the_ratio_needs_the_engine_whatever_the_mask_compares_to():
    for name in DIVERGENCES:
        assert make_objective({"name": name}).needs == {"logmu"}
        assert make_objective({"name": name, "ratio_denominator": "trainer_old"}).needs == {"logmu", "logold"}
    assert make_objective({"name": "dppo_topk"}).needs == {"logmu", "topk"}


@binary
def test_each_direction_may_have_a_bound_of_its_own(name):
    loose, tight = {"name": name, "delta": 1e-6, "delta_high": 9.0}, {"name": name, "delta": 9.0, "delta_high": 1e-6}
    up, down = (0.6, 0.4, 1.0), (0.4, 0.6, -1.0)
    assert [one_token(loose, *token)[1] for token in (up, down)] == [1, 0]
    assert [one_token(tight, *token)[1] for token in (up, down)] == [0, 1]
    assert [one_token({"name": name, "delta": 9.0, "delta_low": 1e-6}, *token)[1] for token in (up, down)] == [1, 0]


@given(probability, probability, advantage, deltas)
def test_among_diverging_tokens_the_tv_mask_is_the_sign_of_the_weight_of_drpo(pi, mu, a, delta):
    assume(abs(abs(pi - mu) - delta) > 1e-9 and abs(pi - mu) > 1e-12)
    kept = one_token({"name": "dppo_tv", "delta": delta}, pi, mu, a)[1] > 0
    w = one_token({"name": "drpo", "delta": delta}, pi, mu, a)[1]
    if a * (pi - mu) > 0:
        assert kept == (w > 0)
    else:
        assert kept and w > 1


@given(probability, probability, advantage)
def test_without_bounds_it_has_the_gradient_of_drpo_without_a_bound(pi, mu, a):
    free = {"name": "dppo_tv", "delta": 1e15, "truncation": 1e15}
    assert one_token(free, pi, mu, a)[2] == pytest.approx(
        one_token({"name": "drpo", "delta": 1e15}, pi, mu, a)[2], rel=1e-6
    )


@given(probability, probability)
def test_binary_divergences_vanish_on_policy_and_are_positive_off_it(pi, mu):
    for name in DIVERGENCES:
        objective = make_objective({"name": name})
        for p in (pi, mu):
            out = objective(LossInputs(f64([[p]]).log(), f64([[mu]]).log(), f64([1]), f64([[1]])))
            distance = out.metrics["divergence"].item()
            assert distance == pytest.approx(DIVERGENCES[name](p, mu), rel=1e-6, abs=1e-9)
            assert distance >= -1e-9


def test_a_token_that_both_policies_hold_certain_keeps_its_gradient_in_float32():
    certain = torch.tensor([[0.0, 1e-7, -1e-7]])
    x = LossInputs(certain, certain.flip(1), torch.tensor([1.0]), torch.ones(1, 3))
    for name in DIVERGENCES:
        out = make_objective({"name": name})(x)
        assert (out.weight_tok == 1).all()
        assert out.metrics["divergence"].abs() < 1e-6


# Top-K


def distributions(seed: int, vocabulary: int, rows: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log p of the engine and of the trainer, [1, rows, vocabulary] each."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(1, rows, vocabulary, generator=g, dtype=torch.float64)
    moved = logits + torch.randn(logits.shape, generator=g, dtype=torch.float64)
    return logits.log_softmax(-1), moved.log_softmax(-1)


def topk_inputs(engine: torch.Tensor, trainer: torch.Tensor, k: int, sampled: torch.Tensor) -> LossInputs:
    logmu_K, ids = engine.topk(k)
    shape = sampled.shape
    return LossInputs(
        logp=trainer.gather(-1, sampled[..., None])[..., 0],
        logmu=engine.gather(-1, sampled[..., None])[..., 0],
        advantages=torch.where(torch.arange(shape[1]) % 2 == 0, 1.0, -1.0).double()[None],
        mask=torch.ones(shape),
        topk=(trainer.gather(-1, ids), logmu_K),
    )


def full(divergence: str, engine: torch.Tensor, trainer: torch.Tensor) -> torch.Tensor:
    if divergence == "tv":
        return (engine.exp() - trainer.exp()).abs().sum(-1) / 2
    return torch.nn.functional.kl_div(trainer, engine, log_target=True, reduction="none").sum(-1)


def measured(x: LossInputs, spec: dict) -> torch.Tensor:
    return make_objective(spec).divergence_of(x.cleaned())


@pytest.mark.parametrize("divergence", ["tv", "kl"])
@given(seed=st.integers(0, 10**6), vocabulary=st.integers(2, 12))
def test_the_whole_vocabulary_gives_the_divergence_itself_and_the_mask_that_follows(divergence, seed, vocabulary):
    engine, trainer = distributions(seed, vocabulary)
    sampled = torch.randint(vocabulary, engine.shape[:2], generator=torch.Generator().manual_seed(seed))
    x = topk_inputs(engine, trainer, vocabulary, sampled)
    spec = {"name": "dppo_topk", "divergence": divergence, "delta": 0.2, "truncation": 1e9}
    exact = full(divergence, engine, trainer)
    torch.testing.assert_close(measured(x, spec), exact, rtol=1e-9, atol=1e-10)
    assume((exact - 0.2).abs().min() > 1e-6)
    dropped = (exact > 0.2) & (x.advantages * (x.logp - x.logmu) > 0)
    assert torch.equal(make_objective(spec)(x).weight_tok == 0, dropped)


@pytest.mark.parametrize(("divergence", "name"), [("tv", "dppo_tv"), ("kl", "dppo_kl")])
@given(seed=st.integers(0, 10**6), vocabulary=st.integers(2, 12))
def test_the_likeliest_token_alone_gives_the_binary_divergence_when_it_is_the_sampled_one(
    divergence, name, seed, vocabulary
):
    engine, trainer = distributions(seed, vocabulary)
    x = topk_inputs(engine, trainer, 1, engine.argmax(-1))
    one = measured(x, {"name": "dppo_topk", "divergence": divergence})
    # The binary KL adds 1e-8 to the mass m of the other tokens. That moves m_p log(m_p / m_q) by at most
    # 1e-8 (1 + m_p / m_q).
    others_p, others_q = -torch.expm1(x.logmu), -torch.expm1(x.logp)
    allowed = 1e-8 * (1 + others_p / others_q) if divergence == "kl" else 0.0
    assert ((one - measured(x, {"name": name})).abs() <= 1e-12 + 1e-9 * one.abs() + allowed).all()


@pytest.mark.parametrize("divergence", ["tv", "kl"])
@given(seed=st.integers(0, 10**6), k=st.integers(1, 5))
def test_more_tokens_never_see_less_divergence_nor_more_than_there_is(divergence, seed, k):
    engine, trainer = distributions(seed, 6)
    sampled = engine.argmax(-1)
    spec = {"name": "dppo_topk", "divergence": divergence}
    fewer, more = (measured(topk_inputs(engine, trainer, n, sampled), spec) for n in (k, k + 1))
    assert (fewer <= more + 1e-9).all()
    assert (more <= full(divergence, engine, trainer) + 1e-9).all()


def test_a_hand_worked_top_2_with_its_rest():
    engine, trainer = f64([[[0.5, 0.3, 0.2]]]).log(), f64([[[0.6, 0.1, 0.3]]]).log()
    x = topk_inputs(engine, trainer, 2, torch.zeros(1, 1, dtype=torch.long))
    assert measured(x, {"name": "dppo_topk"}).item() == pytest.approx(0.2)
    kl = 0.5 * math.log(0.5 / 0.6) + 0.3 * math.log(0.3 / 0.1) + 0.2 * math.log(0.2 / 0.3)
    assert measured(x, {"name": "dppo_topk", "divergence": "kl"}).item() == pytest.approx(kl)


def test_the_default_bound_is_that_of_its_divergence():
    bounds = {d: make_objective({"name": "dppo_topk", "divergence": d}).bounds for d in ("tv", "kl")}
    assert bounds == {"tv": (0.15, 0.15), "kl": (0.05, 0.05)}
    objective = make_objective({"name": "dppo_topk", "divergence": "kl", "delta": 0.3, "delta_low": 0.1})
    assert (objective.bounds, objective.top_k) == ((0.1, 0.3), 20)


def test_the_top_k_sends_no_gradient():
    x = batch(0, [3, 2])
    trainer = x.topk[0].clone().requires_grad_()
    logp = x.logp.clone().requires_grad_()
    make_objective({"name": "dppo_topk"})(replace(x, logp=logp, topk=(trainer, x.topk[1]))).loss.backward()
    assert trainer.grad is None
    assert logp.grad.any()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ratio_denominator": "trainer_old"}, "top-K of the trainer's old policy is not kept"),
        ({"divergence": "js"}, "'divergence' is 'js'"),
        ({"delta": 0}, "'delta' is 0"),
        ({"delta_low": -0.1}, "'delta_low' is -0.1"),
        ({"truncation": 0.0}, "'truncation' is 0.0"),
    ],
)
def test_an_illegal_option_is_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        make_objective({"name": "dppo_topk", **keys})
