import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.diagnostics import ratio_record
from megatron_rl.diagnostics.mismatch import envelope_record, worst_record
from megatron_rl.errors import UserError

log_probs = st.lists(st.floats(-30, 0), min_size=1, max_size=50)


def test_every_statistic_equals_its_formula_on_a_small_sample():
    pi, mu = np.array([0.5, 0.2, 0.9, 0.02]), np.array([0.25, 0.4, 0.9, 0.2])
    r = pi / mu  # 2, 0.5, 1, 0.1
    out = ratio_record(np.log(pi), np.log(mu))
    assert out["kl/k1"] == pytest.approx(np.mean(np.log(mu / pi)))
    assert out["kl/k3"] == pytest.approx(np.mean(r - 1 - np.log(r)))
    assert (out["ratio/min"], out["ratio/max"]) == (pytest.approx(0.1), pytest.approx(2))
    assert out["ratio/q50"] == pytest.approx(0.75)
    assert out["ratio/ess"] == pytest.approx(3.6**2 / (4 * (4 + 0.25 + 1 + 0.01)))
    assert out["dp/mean"] == pytest.approx((0.25 + 0.2 + 0 + 0.18) / 4)
    assert out["dp/max"] == pytest.approx(0.25)
    assert out["chi2"] == pytest.approx((1 + 0.25 + 0 + 0.81) / 4)
    assert out["token_mult_prob_error"] == pytest.approx((2 + 2 + 1 + 10) / 4)
    assert ratio_record(np.log(pi * 1.01), np.log(mu))["ratio/outside_half_two"] == 0.5


def test_equal_policies_show_no_mismatch():
    logp = np.log(np.linspace(0.01, 1, 100))
    out = ratio_record(logp, logp)
    ones = {"ratio/q01", "ratio/q05", "ratio/q25", "ratio/q50", "ratio/q75", "ratio/q95", "ratio/q99"}
    ones |= {"ratio/min", "ratio/max", "ratio/ess", "token_mult_prob_error"}
    ones |= {f"envelope/{edge}/{k}" for edge in ("p02", "p98") for k in range(10)}
    assert all(out[key] == 1 for key in ones)
    assert all(value == 0 for key, value in out.items() if key not in ones)


@given(st.data(), log_probs)
def test_quantiles_are_ordered_k3_is_not_negative_and_the_sample_share_is_in_the_unit_interval(data, logmu):
    logp = data.draw(st.lists(st.floats(-30, 0), min_size=len(logmu), max_size=len(logmu)))
    out = ratio_record(np.array(logp), np.array(logmu))
    ladder = [out[f"ratio/{name}"] for name in ("min", "q01", "q05", "q25", "q50", "q75", "q95", "q99", "max")]
    assert all(low <= high * (1 + 1e-9) for low, high in pairwise(ladder))
    assert out["kl/k3"] >= -1e-12
    assert 0 < out["ratio/ess"] <= 1 + 1e-12
    assert 0 <= out["dp/mean"] <= out["dp/max"] * (1 + 1e-12) <= 1 + 1e-9


def test_both_kl_estimates_agree_with_the_true_divergence_on_samples_from_mu():
    rng = np.random.default_rng(0)
    mu, pi = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.4, 0.2])
    drawn = rng.choice(3, size=200_000, p=mu)
    out = ratio_record(np.log(pi)[drawn], np.log(mu)[drawn])
    truth = np.sum(mu * np.log(mu / pi))
    assert out["kl/k1"] == pytest.approx(truth, abs=2e-3)
    assert out["kl/k3"] == pytest.approx(truth, abs=2e-4)
    assert out["chi2"] == pytest.approx(np.sum(np.square(pi - mu) / mu), abs=1e-3)


def test_a_ratio_beyond_the_float_range_is_reported_as_infinite():
    out = ratio_record(np.array([0.0, 0.0]), np.array([-2000.0, 0.0]))
    assert out["ratio/max"] == np.inf
    assert out["ratio/ess"] == pytest.approx(0.5)


def test_malformed_arrays_are_refused_by_name():
    with pytest.raises(UserError, match="one length"):
        ratio_record(np.zeros(3), np.zeros(2))
    with pytest.raises(UserError, match="not empty"):
        ratio_record(np.zeros(0), np.zeros(0))
    with pytest.raises(UserError, match=r"logmu\[1\] is nan"):
        ratio_record(np.zeros(2), np.array([0, np.nan]))


@given(st.data(), st.lists(st.floats(-8, 0), min_size=1, max_size=60))
def test_every_bin_of_the_envelope_is_the_quantiles_of_its_own_tokens(data, logmu):
    shift = data.draw(st.lists(st.floats(-3, 3), min_size=len(logmu), max_size=len(logmu)))
    mu, x = np.exp(np.array(logmu)), np.array(shift)
    record = envelope_record(np.array(logmu) + x, np.array(logmu))
    seen = 0
    for k in range(10):
        inside = (mu >= k / 10) & ((mu < (k + 1) / 10) | (k == 9))
        inside &= np.minimum((mu * 10).astype(int), 9) == k  # rounding of mu x 10 decides at the edge of a bin
        if not inside.any():
            assert f"envelope/p02/{k}" not in record
            continue
        seen += 1
        low, high = np.quantile(np.exp(x[inside]), [0.02, 0.98])
        assert record[f"envelope/p02/{k}"] == pytest.approx(low) and record[f"envelope/p98/{k}"] == pytest.approx(high)
    assert len(record) == 2 * seen


def test_the_worst_trajectories_are_named_with_their_prompts_worst_first():
    shift = np.array([0.1, -0.2, 3.0, 0.0, -5.0, 1.0, 0.5, 0.4])
    rows = np.array([0, 0, 1, 1, 2, 3, 4, 5])
    ids = np.array([10, 11, 12, 13, 14, 15, 16])  # the last one has no trained token
    out = worst_record(shift - 1, np.full(8, -1.0), rows, ids, tuple("abcdefg"))
    assert out["worst/trajectory"] == [12, 11, 13, 14, 15]
    assert json.loads(out["worst/prompt_ids"]) == ["c", "b", "d", "e", "f"]
    assert out["worst/max"] == pytest.approx([5.0, 3.0, 1.0, 0.5, 0.4])
    assert out["worst/mean"] == pytest.approx([5.0, 1.5, 1.0, 0.5, 0.4])
    few = worst_record(shift[:2], np.zeros(2), rows[:2], ids[:2], ())
    assert few["worst/trajectory"] == [10] and few["worst/prompt_ids"] == "[]"
