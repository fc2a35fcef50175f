"""Score centering equals its closed form: the mean of the weighted score under the engine is subtracted. In float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.objectives import LossInputs, make_objective
from tests.unit.objectives.specs import batch, f64

MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "tis": {"low": 0.6, "high": 1.5},
    "icepop": {"low": 0.6, "high": 1.5},
}
P, Q = [0.5, 0.3, 0.15, 0.05], [0.3, 0.4, 0.2, 0.1]  # p / q = 1.6667, 0.75, 0.75, 0.5


def inputs(logits: Tensor, q: Tensor, ids: Tensor, a: float, token: int = 0) -> LossInputs:
    """Return one sampled token with the engine's top-K tokens `ids`, differentiable in the policy's logits [V]."""
    logp = logits.log_softmax(-1)
    one = torch.ones(1, 1, dtype=torch.float64)
    return LossInputs(
        logp[token].reshape(1, 1),
        q.log()[token].reshape(1, 1),
        f64([a]),
        one,
        topk=(logp[ids][None, None], q[ids].log()[None, None]),
    )


def objective(mode: str, k: int):
    return make_objective({"name": "naive", "score_centering": {"mode": mode, "top_k": k, **MODES[mode]}})


def added(mode: str, k: int, p: Tensor, q: Tensor, a: float = 1.0) -> Tensor:
    """Return the gradient in the logits that centering adds to the loss."""
    logits = p.log().requires_grad_()
    ids = q.topk(k).indices
    loss = (
        objective(mode, k)(inputs(logits, q, ids, a)).loss
        - make_objective({"name": "naive"})(inputs(logits, q, ids, a)).loss
    )
    return torch.autograd.grad(loss, logits)[0]


def weights(mode: str, p: Tensor, q: Tensor) -> Tensor:
    """Return the weight of every token as the definition of the correction has it."""
    r = p / q
    if mode == "none":
        return torch.ones_like(r)
    return r.clamp(0.6, 1.5) if mode == "tis" else r * ((r >= 0.6) & (r <= 1.5))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # c = m - alpha p over the whole vocabulary, alpha = 0; the gradient is c - p sum(c).
        ("none", [-0.2, 0.1, 0.05, 0.05]),
        ("tis", [0.45 - 0.5 * 0.96, 0.3 - 0.3 * 0.96, 0.15 - 0.15 * 0.96, 0.06 - 0.05 * 0.96]),
        ("icepop", [-0.5 * 0.45, 0.3 - 0.3 * 0.45, 0.15 - 0.15 * 0.45, -0.05 * 0.45]),
    ],
)
def test_the_gradient_equals_the_worked_numbers(mode, expected):
    torch.testing.assert_close(added(mode, 4, f64(P), f64(Q)), f64(expected))
    torch.testing.assert_close(added(mode, 4, f64(P), f64(Q), a=-2.0), -2 * f64(expected))


def test_a_head_of_two_tokens_models_the_tail_by_the_policys_own():
    """H = tokens 1, 0: rho = 0.3 / 0.2 = 1.5, so q is taken as 0.3, 0.4, 0.225, 0.075."""
    torch.testing.assert_close(added("none", 2, f64(P), f64(Q)), f64([-0.2, 0.1, 0.075, 0.025]))


@pytest.mark.parametrize("mode", MODES)
def test_with_the_whole_vocabulary_the_mean_gradient_under_the_engine_is_exactly_zero(mode):
    """Sum over sampled tokens v of q(v) times the gradient of the weighted and centered loss."""
    p, q = (torch.randn(7, generator=torch.Generator().manual_seed(s), dtype=torch.float64).softmax(-1) for s in (1, 2))
    logits, ids = p.log().requires_grad_(), q.topk(7).indices
    logp, w = logits.log_softmax(-1), weights(mode, p, q)
    uncentered = torch.autograd.grad(-(q * w * logp).sum(), logits)[0]
    assert uncentered.abs().max() > 1e-2, "without the term there is a drift"
    torch.testing.assert_close(added(mode, 7, p, q), -uncentered)
    assert ids.sort().values.tolist() == list(range(7))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k", [1, 3, 7])
def test_equal_policies_have_nothing_to_center(mode, k):
    p = torch.randn(7, generator=torch.Generator().manual_seed(3), dtype=torch.float64).softmax(-1)
    assert added(mode, k, p, p).abs().max() < 1e-9


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k", [2, 5])
def test_the_gradient_is_c_minus_p_sum_c_and_equals_finite_differences(mode, k):
    p, q = (torch.randn(7, generator=torch.Generator().manual_seed(s), dtype=torch.float64).softmax(-1) for s in (4, 5))
    head = q.topk(k).indices
    rho = (1 - q[head].sum()) / (1 - p[head].sum())
    if mode == "none":
        mass, alpha = q, rho
    elif mode == "tis":
        mass, alpha = torch.minimum(torch.maximum(p, 0.6 * q), 1.5 * q), min(max(1.0, 0.6 * rho), 1.5 * rho)
    else:
        mass, alpha = p * ((p / q >= 0.6) & (p / q <= 1.5)), float(0.6 <= 1 / rho <= 1.5)
    c = torch.zeros(7, dtype=torch.float64)
    c[head] = (mass - alpha * p)[head]
    torch.testing.assert_close(added(mode, k, p, q), c - p * c.sum())
    step = 1e-6 * torch.eye(7, dtype=torch.float64)
    values = [(c * (p.log() + sign * s).log_softmax(-1)).sum() for s in step for sign in (1, -1)]
    slopes = torch.stack(values).view(7, 2)
    torch.testing.assert_close((slopes[:, 0] - slopes[:, 1]) / 2e-6, c - p * c.sum(), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", ["naive", "ppo", "drpo", "cispo", "dppo_topk", "asympo", "cppo"])
def test_the_term_is_added_to_any_objective_under_its_norm_and_reported(name):
    x = batch(5, [4, 2, 3])
    own = {"top_k": 3} if name == "dppo_topk" else {}
    spec = {"name": name, "norm": "seq_mean_token_mean", **own}
    plain = make_objective(spec)(x)
    centered = make_objective({**spec, "score_centering": {"mode": "tis", "top_k": 3}})
    out = centered(x)
    term, _ = centered.score_centering.term(*x.topk)
    rows = (x.advantages[:, None] * term * x.mask).sum(1) / x.mask.sum(1)
    assert (out.loss - plain.loss).item() == pytest.approx(rows.mean().item(), abs=1e-12)
    assert torch.equal(out.loss_tok, plain.loss_tok)
    tail = (1 - x.topk[1].exp().sum(-1))[x.mask > 0].mean()
    assert out.metrics["centering/tail"].item() == pytest.approx(tail.item())
    assert centered.needs >= {"topk", "logmu"} and centered.topk == 3


def test_without_the_term_the_top_tokens_get_no_gradient():
    x = batch(5, [4, 2])
    logp_K = x.topk[0].clone().requires_grad_()
    loss = make_objective({"name": "dppo_topk", "top_k": 3})(
        replace(x, logp=x.logp.requires_grad_(), topk=(logp_K, x.topk[1]))
    ).loss
    assert torch.autograd.grad(loss, logp_K, allow_unused=True)[0] is None


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"name": "ppo", "score_centering": True}, "must be a mapping"),
        ({"name": "ppo", "score_centering": {"mod": "none"}}, "no key 'mod'; did you mean 'mode'"),
        ({"name": "ppo", "score_centering": {"mode": "mis"}}, "'mode' is 'mis'"),
        ({"name": "ppo", "score_centering": {"top_k": 65}}, "'top_k' is 65"),
        ({"name": "ppo", "score_centering": {"mode": "tis", "low": 3.0}}, "low is 3 and high 2"),
        ({"name": "dppo_topk", "score_centering": {"top_k": 64}}, "top_k is 20 and score_centering.top_k 64"),
        ({"name": "erpd_mse", "score_centering": {}}, "erpd_mse has no advantages"),
    ],
)
def test_what_cannot_be_centered_is_refused(spec, words):
    with pytest.raises(ConfigError, match=words):
        make_objective(spec)


def test_missing_top_tokens_are_an_error():
    with pytest.raises(UserError, match="needs 'topk'"):
        make_objective({"name": "naive", "score_centering": {}})(replace(batch(1, [2]), topk=None))
