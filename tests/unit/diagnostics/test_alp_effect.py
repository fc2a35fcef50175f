"""The log describes the effect of a perturbation."""

import numpy as np
import pytest

from megatron_rl.diagnostics.alp_effect import rounding_warning, shift_record, spread_record


def test_shifts_are_differences_of_probabilities():
    clean = np.log(np.array([0.5, 0.5, 0.2, 0.1], dtype=np.float64))
    perturbed = np.log(np.array([0.5, 0.6, 0.1, 0.4], dtype=np.float64))
    record = shift_record(perturbed, clean)
    assert record["alp/shift/max"] == pytest.approx(0.3)
    assert record["alp/shift/p50"] == pytest.approx(0.1)
    assert record["alp/shift/p75"] == pytest.approx(0.15)
    assert record["alp/unmoved"] == 0.25


def test_noise_that_moves_less_than_half_of_all_tokens_is_warned_of_with_the_numbers():
    clean = np.log(np.full(10, 0.5))
    perturbed = clean.copy()
    perturbed[:4] += 0.1
    text = rounding_warning(shift_record(perturbed, clean))
    assert text is not None and "60% of tokens" in text and "alp.sigma_init" in text
    perturbed[:6] += 0.1
    assert rounding_warning(shift_record(perturbed, clean)) is None


def test_the_spread_is_quantiles_of_the_ratios_and_their_envelope_in_each_bin_of_mu():
    rng = np.random.default_rng(0)
    mu = np.concatenate([np.full(101, 0.35), np.full(101, 1.0)])
    ratio = np.concatenate([rng.permutation(np.linspace(0.5, 1.5, 101)), np.full(101, 0.9)])
    record = spread_record("x", np.log(mu * ratio), np.log(mu))
    assert record["x/envelope/p02/3"] == pytest.approx(0.52) and record["x/envelope/p98/3"] == pytest.approx(1.48)
    assert record["x/envelope/p02/9"] == pytest.approx(0.9)
    assert "x/envelope/p02/4" not in record
    assert record["x/ratio/q50"] == pytest.approx(0.9)
