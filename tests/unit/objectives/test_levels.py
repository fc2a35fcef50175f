"""A ratio over a token, a sequence, or the preceding tokens has the same value in every layout of the tokens."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.errors import ConfigError
from megatron_rl.objectives import LossInputs, make_objective
from megatron_rl.objectives.packed_rows import PackedRows
from tests.unit.objectives.specs import HORIZON, MODES, batch, f64, gradient, mapped, only_needed, packed, trained

LEVELS = ["token", "sequence", "geometric", "cumulative"]
PPO = {"name": "ppo", "clip_low": 0.4, "clip_high": 0.6, "dual_clip": 3.0}

every_level = pytest.mark.parametrize("level", LEVELS)
sizes = st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any)
seeds = st.integers(0, 10**6)


def pooled(x: LossInputs, level: str) -> torch.Tensor:
    """Return the log-ratio of every trained token, [B, T], by definition, one sequence at a time."""
    out = torch.zeros_like(x.logp)
    for row, keep in enumerate(x.mask.bool()):
        steps = (x.logp - x.logmu)[row, keep].tolist()
        for i, t in enumerate(keep.nonzero()[:, 0]):
            total = {"token": steps[i], "cumulative": sum(steps[: i + 1])}.get(level, sum(steps))
            out[row, t] = total / len(steps) if level == "geometric" else total
    return out


@every_level
@settings(max_examples=25)
@given(seed=seeds, lengths=sizes, holes=st.booleans())
def test_the_log_ratio_is_the_sum_or_mean_its_level_names(level, seed, lengths, holes):
    x = batch(seed, lengths)
    if holes:
        x = replace(x, mask=x.mask * (torch.arange(x.mask.shape[1]) % 3 != 1))
    torch.testing.assert_close(x.cleaned().log_ratio(level=level) * x.mask, pooled(x, level), rtol=1e-12, atol=1e-12)


@every_level
@settings(max_examples=25)
@given(seed=seeds, lengths=sizes, mode=st.sampled_from(MODES), data=st.data())
def test_interleaved_packed_sequences_give_the_loss_and_gradient_of_padded_ones(level, seed, lengths, mode, data):
    objective = make_objective({**PPO, "ratio_level": level, "norm": {"mode": mode, "horizon": HORIZON}})
    x = only_needed(objective, batch(seed, lengths))
    width = x.mask.shape[1]
    turns = data.draw(st.permutations((trained(x, list(range(len(lengths)))) // width).tolist()))
    # The interleaving of sequences is arbitrary; within a sequence the order stays.
    source = torch.tensor([row * width + turns[:i].count(row) for i, row in enumerate(turns)])
    ids = data.draw(st.lists(st.integers(0, 10**12), min_size=len(lengths), max_size=len(lengths), unique=True))
    loss, grad = gradient(objective, x)
    packed_loss, packed_grad = gradient(objective, packed(x, source, ids, padding=2))
    assert packed_loss == pytest.approx(loss, rel=1e-10, abs=1e-11)
    torch.testing.assert_close(packed_grad[0, : len(source)], grad.flatten(0, 1)[source], rtol=1e-10, atol=1e-11)


@given(st.lists(st.one_of(st.integers(-1, 3), st.integers(-1, 10**15)), min_size=1, max_size=12))
def test_sequences_are_numbered_and_summed_alike_on_every_device(ids):
    distinct = sorted(set(ids))
    values = torch.arange(1.0, len(ids) + 1)
    total = {i: sum(value for value, other in zip(values.tolist(), ids, strict=True) if other == i) for i in ids}
    for by_runs in (False, True):  # False on a GPU; it works on any device
        rows = PackedRows(torch.tensor(ids), by_runs=by_runs)
        assert rows.of_token.tolist() == [distinct.index(i) for i in ids]
        assert rows.spread(rows.sums(values)).tolist() == [total[i] for i in ids]
        running = [
            sum(v for v, other in zip(values[: at + 1].tolist(), ids, strict=False) if other == i)
            for at, i in enumerate(ids)
        ]
        assert rows.running_sums(values).tolist() == running


@settings(max_examples=25)
@given(seed=seeds, rows=st.integers(1, 4), mode=st.sampled_from(MODES))
def test_a_response_of_one_token_is_the_same_at_every_level(seed, rows, mode):
    x = batch(seed, [1] * rows)
    results = [gradient(make_objective({**PPO, "ratio_level": level, "norm": mode}), x) for level in LEVELS]
    for loss, grad in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-12, abs=1e-14)
        torch.testing.assert_close(grad, results[0][1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("level", ["sequence", "geometric"])
@settings(max_examples=25)
@given(seed=seeds, order=st.permutations(range(6)))
def test_a_sequence_value_does_not_know_the_order_of_its_tokens(level, seed, order):
    x = batch(seed, [6, 6])
    shuffled = mapped(x, lambda _, tensor: tensor[:, order] if tensor.ndim > 1 else tensor)
    ratio = x.log_ratio(level=level)
    torch.testing.assert_close(shuffled.log_ratio(level=level), ratio, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-12, atol=1e-13)


def test_a_cumulative_value_does_know_it():
    x = batch(0, [4])
    turned = mapped(x, lambda _, tensor: tensor.flip(1) if tensor.ndim > 1 else tensor)
    assert not torch.allclose(x.log_ratio(level="cumulative"), turned.log_ratio(level="cumulative"))


@every_level
def test_beyond_a_token_the_gradient_of_each_is_the_pooled_ratio_times_its_own(level):
    x = batch(3, [4, 2])
    logp = x.logp.clone().requires_grad_()
    ratio = replace(x, logp=logp).cleaned().ratio(level=level)
    ratio.sum().backward()
    torch.testing.assert_close(logp.grad * x.mask, ratio.detach() * x.mask, rtol=1e-14, atol=0)


def test_a_long_cumulative_sum_is_as_exact_packed_as_padded_in_float32():
    g = torch.Generator().manual_seed(0)
    lengths = [4000, 3000]
    mask = (torch.arange(4000) < torch.tensor(lengths)[:, None]).float()
    logmu = -torch.rand(mask.shape, generator=g)
    logp = (logmu + 1e-3 * torch.randn(mask.shape, generator=g)) * mask
    x = LossInputs(logp, logmu * mask, torch.ones(2), mask)
    source = trained(x, [1, 0])
    out = packed(x, source, [5, 2], padding=0).log_ratio(level="cumulative")
    torch.testing.assert_close(out[0], x.log_ratio(level="cumulative").flatten()[source], rtol=0, atol=1e-7)


# lr of arXiv 2603.19470's losses: two responses, with three and two tokens.
LOG_RATIO = [[0.1, 0.5, -0.2], [-0.9, 1.6, 0.0]]
LENGTHS_MASK = [[1, 1, 1], [1, 1, 0]]
WORKED = {
    ("token", 0.2, 0.28, 10.0): (
        [[-1.105171, -1.28, -0.818731], [0.8, 4.953032, 0]],
        [[-1.105171, 0, -0.818731], [0, 4.953032, 0]],
        0.509826,
    ),
    ("sequence", 0.5, 3.0, 3.0): (
        [[-1.491825] * 3, [2.013753, 2.013753, 0]],
        [[-1.491825] * 3, [2.013753, 2.013753, 0]],
        -0.089594,
    ),
    ("sequence", 0.2, 0.28, 10.0): (
        [[-1.28] * 3, [2.013753, 2.013753, 0]],
        [[0] * 3, [2.013753, 2.013753, 0]],
        0.037501,
    ),
    ("token", 0.5, 3.0, 3.0): (
        [[-1.105171, -1.648721, -0.818731], [0.5, 3.0, 0]],
        [[-1.105171, -1.648721, -0.818731], [0, 0, 0]],
        -0.014525,
    ),
}


def worked_inputs(logp: torch.Tensor) -> LossInputs:
    return LossInputs(logp, f64([[-2.0] * 3] * 2), f64([1, -1]), f64(LENGTHS_MASK))


@pytest.mark.parametrize("case", WORKED, ids=str)
def test_clipped_losses_and_gradients_equal_the_worked_numbers(case):
    level, low, high, dual = case
    losses, grads, mean = WORKED[case]
    logp = (f64(LOG_RATIO) - 2).requires_grad_()
    spec = {
        "name": "ppo",
        "ratio_level": level,
        "clip_low": low,
        "clip_high": high,
        "dual_clip": dual,
        "norm": "token_mean",
    }
    out = make_objective(spec)(worked_inputs(logp))
    out.loss_tok.sum().backward()
    torch.testing.assert_close(out.loss_tok.detach(), f64(losses), atol=6e-7, rtol=0)
    torch.testing.assert_close(logp.grad, f64(grads), atol=6e-7, rtol=0)
    assert out.loss.item() == pytest.approx(mean, abs=6e-7)


def test_geometric_ratios_equal_the_worked_numbers():
    ratio = worked_inputs(f64(LOG_RATIO) - 2).cleaned().ratio(level="geometric")
    torch.testing.assert_close(ratio, f64([[1.142631] * 3, [1.419068] * 3]), atol=6e-7, rtol=0)


@every_level
@settings(max_examples=25)
@given(seed=seeds, lengths=sizes, name=st.sampled_from(["ppo", "grpo", "dapo"]))
def test_on_policy_the_loss_is_minus_the_mean_advantage_and_the_gradient_is_reinforce(level, seed, lengths, name):
    x = batch(seed, lengths)
    loss, grad = gradient(
        make_objective({"name": name, "ratio_level": level, "norm": "token_mean"}), replace(x, logmu=x.logp)
    )
    expected = -x.advantages[:, None] * x.mask / x.mask.sum()
    assert loss == pytest.approx(expected.sum().item(), abs=1e-12)
    torch.testing.assert_close(grad[..., 0], expected, rtol=1e-12, atol=1e-14)


@every_level
@settings(max_examples=25)
@given(seed=seeds, lengths=sizes)
def test_the_coefficient_has_the_sign_of_the_advantage_and_is_bounded_by_the_clip(level, seed, lengths):
    objective = make_objective({**PPO, "ratio_level": level})
    x = batch(seed, lengths)
    a = x.advantages[:, None].expand_as(x.logp)
    coefficient = -gradient(objective, x)[1][..., 0] * x.mask.sum()
    assert ((coefficient == 0) | (coefficient.sign() == a.sign())).all()
    assert (coefficient.abs() <= a.abs() * torch.where(a > 0, 1.6, 3.0) + 1e-12).all()


@pytest.mark.parametrize(
    "name", ["drpo", "simple_po", "cispo", "sapo", "minirl", "dppo_tv", "dppo_kl", "dppo_topk", "gspo"]
)
def test_a_level_that_no_paper_defines_for_a_method_is_refused(name):
    legal = "geometric" if name == "gspo" else "token"
    assert make_objective({"name": name, "ratio_level": legal}).ratio_level == legal
    with pytest.raises(ConfigError, match=f"'ratio_level' is 'sequence'.*valid: {legal}"):
        make_objective({"name": name, "ratio_level": "sequence"})
