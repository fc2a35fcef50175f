"""`doctor --sync`: the verdict against published bars, and the configuration that it runs."""

from pathlib import Path

import numpy as np
import pytest

from megatron_rl.config import make_config
from megatron_rl.diagnostics.mismatch import ratio_record
from megatron_rl.trainer.sync_check import bars_above, sync_lines, without_updates


def record(log_ratio: float) -> dict[str, float]:
    """Return a round in which half of the tokens have this log ratio, and half its negative."""
    logmu = np.full(64, -1.0)
    logp = logmu + log_ratio * np.where(np.arange(64) % 2, 1, -1)
    return ratio_record(logp, logmu) | {"version": 1.0, "tokens": 64.0}


@pytest.mark.parametrize(
    ("log_ratios", "failed"),
    [
        ((0.0, 0.0), []),
        ((0.048, 0.048), []),
        ((0.0, 0.05), ["token_mult_prob_error"]),  # exp(0.05) = 1.051
        ((0.05, 0.0), ["token_mult_prob_error"]),
        ((0.0, 0.18), ["kl/k3", "token_mult_prob_error"]),  # cosh(0.18) - 1 = 0.0162
    ],
)
def test_every_round_must_be_below_every_bar(log_ratios, failed):
    records = [record(value) for value in log_ratios]
    assert [bar.key for bar in bars_above(records)] == failed
    text = "\n".join(sync_lines(records))
    assert text.count("ABOVE") == len(failed) and ("DISAGREE" in text) == bool(failed)


def test_a_number_that_is_not_finite_is_no_agreement():
    assert bars_above([record(0.0) | {"kl/k3": float("nan")}])


def test_the_check_keeps_what_decides_the_mismatch_and_writes_nowhere_else(tmp_path: Path):
    sections = {
        "rollout": {"max_staleness": 4, "update_mode": "in_place", "oversample": 2, "temperature": 0.7},
        "precision": {"train": "bf16", "rollout": "nvfp4"},
        "run": {"seed": 9, "name": "mine", "loggers": ["wandb"], "attribute_every": 1},
    }
    config = make_config({"model": {"path": "m"}, **sections})
    check = without_updates(config, tmp_path)
    assert (check.run.folder.parent, check.run.seed, check.run.loggers) == (tmp_path, 9, ())
    assert check.precision == config.precision and check.rollout.temperature == 0.7 and check.rollout.record_logmu
    assert make_config(check.model_dump(mode="json")) == check, "it breaks no rule between keys"
