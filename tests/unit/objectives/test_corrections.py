"""Corrections for the mismatch of engine and trainer have the stated weight and mask, multiply, and check options."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.objectives import LossInputs, make_objective
from tests.unit.objectives.specs import batch, f64, gradient

# pi_old / mu of two responses, with three and two tokens. Their products are 1.5 and 2.4, their geometric means
# 1.1447 and 1.5492.
RHO = [[0.5, 3.0, 1.0], [6.0, 0.4, 1.0]]
MASK = [[1, 1, 1], [1, 1, 0]]
STALENESS = [[0, 1, 2], [2, 0, 5]]
PPO = {"name": "ppo", "ratio_denominator": "trainer_old"}


def inputs() -> LossInputs:
    logmu = f64([[-4.0] * 3] * 2)
    logold = logmu + f64(RHO).log()
    logp = logold + f64([[0.1, -0.1, 0.05], [0.02, -0.3, 0.2]])
    return LossInputs(logp, logmu, f64([1, -1]), f64(MASK), logold=logold, staleness=f64(STALENESS))


def factor(*corrections, **keys) -> torch.Tensor:
    """Return the factor [B, T] by which the corrections multiply the loss.

    The factor is the same for w and, token by token, for the gradient.
    """
    x, base = inputs(), make_objective({**PPO, **keys})
    corrected = make_objective({**PPO, **keys, "corrections": list(corrections)})
    plain, out = base(x), corrected(x)
    ratio = torch.where(x.mask > 0, out.loss_tok / plain.loss_tok, 0.0)
    torch.testing.assert_close(out.weight_tok, plain.weight_tok * ratio, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient(corrected, x)[1], gradient(base, x)[1] * ratio[..., None], rtol=1e-14, atol=0)
    return ratio


CASES = {
    "tis": ({"name": "tis"}, [[0.5, 2, 1], [2, 0.4, 0]]),
    "tis-threshold": ({"name": "tis", "threshold": 4.0}, [[0.5, 3, 1], [4, 0.4, 0]]),
    "tis-sequence": ({"name": "tis", "level": "sequence"}, [[1.5] * 3, [2, 2, 0]]),
    "mis": ({"name": "mis"}, [[0.5, 0, 1], [0, 0.4, 0]]),
    "mis-sequence": ({"name": "mis", "level": "sequence"}, [[1.5] * 3, [0, 0, 0]]),
    "mis-mask": ({"name": "mis", "weight": False}, [[1, 0, 1], [0, 1, 0]]),
    "mis-mask-sequence": ({"name": "mis", "weight": False, "level": "sequence"}, [[1] * 3, [0, 0, 0]]),
    "icepop": ({"name": "icepop"}, [[0.5, 3, 1], [0, 0, 0]]),
    "icepop-mask": ({"name": "icepop", "weight": False, "low": 0.45, "high": 2.0}, [[1, 0, 1], [0, 0, 0]]),
    "geo_mask": ({"name": "geo_mask", "low": 0.9, "high": 1.2}, [[1] * 3, [0, 0, 0]]),
    "stale_mask": ({"name": "stale_mask"}, [[1, 0, 0], [0, 1, 0]]),
    "stale_mask-1": ({"name": "stale_mask", "max_staleness": 1}, [[1, 1, 0], [0, 1, 0]]),
    "geo_mask-low": ({"name": "geo_mask", "low": 1.2, "high": 1.6}, [[0] * 3, [1, 1, 0]]),
}


@pytest.mark.parametrize("case", CASES)
def test_weight_and_mask_are_those_worked_by_hand(case):
    correction, expected = CASES[case]
    # At rho = low = 0.5 the result depends on rounding.
    nudged = {**correction, "low": 0.4999} if case == "icepop" else correction
    torch.testing.assert_close(factor(nudged), f64(expected), rtol=1e-12, atol=0)


@given(st.lists(st.sampled_from(sorted(CASES)), min_size=2, max_size=3))
def test_corrections_multiply(cases):
    corrections = [CASES[case][0] for case in cases]
    separate = torch.stack([factor(correction) for correction in corrections]).prod(0)
    torch.testing.assert_close(factor(*corrections), separate, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo", "sapo", "simple_po", "drpo"])
def test_they_compose_with_every_objective_whose_ratio_is_free_of_the_engine(name):
    torch.testing.assert_close(factor({"name": "tis"}, name=name), f64(CASES["tis"][1]), rtol=1e-12, atol=0)


def test_masked_tokens_keep_counting_in_the_norm():
    x = inputs()
    out = make_objective({**PPO, "corrections": [{"name": "mis"}]})(x)
    assert out.loss.item() == pytest.approx(out.loss_tok.sum().item() / 5)


def test_metrics_report_weights_and_shares_of_what_was_truncated_or_masked():
    corrections = [
        {"name": "tis"},
        {"name": "mis"},
        {"name": "icepop", "low": 0.45},
        {"name": "geo_mask", "low": 0.9, "high": 1.2},
        {"name": "stale_mask"},
    ]
    metrics = make_objective({**PPO, "corrections": corrections})(inputs()).metrics
    expected = {
        "tis/weight": 5.9 / 5,
        "tis/truncated": 0.4,
        "mis/masked": 0.4,
        "icepop/masked": 0.4,
        "geo_mask/masked": 0.4,
    }
    expected["stale_mask/masked"] = 0.6
    assert {name: metrics[name].item() for name in expected} == pytest.approx(expected)


@given(seed=st.integers(0, 10**6), correction=st.sampled_from(["mis", "icepop"]))
def test_with_the_engine_below_masks_look_at_the_current_policy_and_send_no_gradient(seed, correction):
    x = batch(seed, [4, 3])
    bounds = {"threshold": 1.3} if correction == "mis" else {"low": 0.7, "high": 1.3}
    spec = {"name": "drpo", "corrections": [{"name": correction, "weight": False, **bounds}]}
    objective = make_objective(spec)
    assert objective.needs == {"logmu"}
    ratio = x.ratio()
    kept = (ratio <= 1.3) & ((ratio >= 0.7) | (correction == "mis"))
    base = gradient(make_objective({"name": "drpo"}), x)[1]
    torch.testing.assert_close(gradient(objective, x)[1], base * kept[..., None], rtol=1e-14, atol=0)


def test_a_correction_that_weighs_brings_in_the_trainers_old_policy_and_needs_both():
    objective = make_objective({"name": "grpo", "corrections": [{"name": "tis"}]})
    assert objective.ratio_denominator == "trainer_old"
    assert objective.needs == {"logold", "logmu"}
    with pytest.raises(UserError, match="logmu"):
        objective(replace(inputs(), logmu=None))


def test_the_age_of_tokens_is_asked_for_by_the_mask_that_looks_at_it_and_nothing_else_of_the_engine():
    objective = make_objective({**PPO, "corrections": [{"name": "stale_mask"}]})
    assert objective.needs == {"logold", "staleness"}
    with pytest.raises(UserError, match="staleness"):
        objective(replace(inputs(), staleness=None))


def test_masks_compare_old_policy_and_engine_in_methods_always_weighted_by_the_engine():
    x = inputs()
    mask = f64(CASES["mis-mask"][1])
    for spec in ({"name": "minirl"}, {"name": "dppo_tv", "ratio_denominator": "trainer_old"}):
        base, out = (
            make_objective(spec)(x),
            make_objective({**spec, "corrections": [{"name": "mis", "weight": False}]})(x),
        )
        torch.testing.assert_close(out.loss_tok, base.loss_tok * mask, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["minirl", "dppo_tv", "dppo_kl", "dppo_topk"])
def test_weighing_twice_by_the_engine_is_refused(name):
    for spec in ({}, {"ratio_denominator": "rollout"}):
        with pytest.raises(ConfigError, match=f"objective {name}: correction tis weighs .* always weighted"):
            make_objective({"name": name, **spec, "corrections": [{"name": "tis"}]})


@pytest.mark.parametrize("correction", [{"name": "tis"}, {"name": "mis"}, {"name": "icepop"}])
def test_a_correction_that_weighs_is_refused_with_the_engine_below(correction):
    with pytest.raises(ConfigError, match=rf"correction {correction['name']} weighs .* ratio_denominator: trainer_old"):
        make_objective({"name": "grpo", "ratio_denominator": "rollout", "corrections": [correction]})


@pytest.mark.parametrize(
    ("corrections", "message"),
    [
        ([{"name": "tiss"}], r"corrections\[0\]: unknown correction 'tiss'; did you mean 'tis'"),
        ([{"name": "tis"}, {"threshold": 2}], r"corrections\[1\]: unknown correction None"),
        ([{"name": "tis", "treshold": 2}], "no key 'treshold'; did you mean 'threshold'"),
        ([{"name": "tis", "threshold": 0}], "correction tis: 'threshold' is 0"),
        ([{"name": "tis", "level": "geometric"}], "'level' is 'geometric'"),
        ([{"name": "mis", "weight": 1}], "'weight' is 1; it must be true or false"),
        ([{"name": "geo_mask"}], "needs both 'low' and 'high'"),
        ([{"name": "geo_mask", "low": 0.9}], "needs both 'low' and 'high'"),
        ([{"name": "stale_mask", "max_staleness": -1}], "'max_staleness' is -1"),
        ([{"name": "geo_mask", "low": 1.1, "high": 0.9}], "low must be the smaller"),
        ([{"name": "icepop", "low": 5.0}], "low must be the smaller"),
        (["tis"], r"corrections\[0\] is 'tis'"),
        ({"name": "tis"}, "must be a list"),
    ],
)
def test_an_illegal_correction_is_refused(corrections, message):
    with pytest.raises(ConfigError, match=message):
        make_objective({**PPO, "corrections": corrections})


def test_a_weight_stays_finite_where_the_policies_are_worlds_apart():
    x = replace(inputs(), logmu=f64([[-1e4] * 3] * 2))
    out = make_objective({**PPO, "corrections": [{"name": "mis", "threshold": 1e300, "level": "sequence"}]})(x)
    assert out.loss.isfinite()
    assert out.loss_tok[0, 0].item() == pytest.approx(-math.exp(20.1), rel=1e-9)


def test_two_corrections_of_one_kind_keep_their_own_metrics():
    both = [{"name": "mis", "threshold": 1.0}, {"name": "mis", "threshold": 1.0, "level": "sequence"}]
    together = make_objective({**PPO, "corrections": both})(inputs()).metrics
    for correction, key in zip(both, ("mis/masked", "mis_sequence/masked"), strict=True):
        alone = make_objective({**PPO, "corrections": [correction]})(inputs()).metrics
        assert together[key] == alone[key]
    assert together["mis/masked"] != together["mis_sequence/masked"]
