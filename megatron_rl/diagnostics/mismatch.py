"""How far the trainer's policy pi is from the policy mu that wrote the tokens, tails first."""

import numpy as np

from megatron_rl.errors import UserError

QUANTILES = {"q01": 0.01, "q05": 0.05, "q25": 0.25, "q50": 0.50, "q75": 0.75, "q95": 0.95, "q99": 0.99}


def ratio_record(logp: np.ndarray, logmu: np.ndarray) -> dict[str, float]:
    """Statistics of the importance ratios r = exp(x), x = logp - logmu, of trained tokens; computed in float64.

    logp, logmu [N]: log-probabilities of the sampled tokens, in nats. With tokens drawn from mu:

    kl/k1                    mean(-x): unbiased estimate of KL(mu || pi) in nats a token; may be negative
    kl/k3                    mean(exp(x) - 1 - x): unbiased too, every term >= 0
    ratio/q01 ... q99        quantiles of r (linear interpolation); ratio/min, ratio/max
    ratio/ess                (sum r)^2 / (N sum r^2): effective share of the sample, in (0, 1], 1 when all ratios are equal
    ratio/outside_half_two   share of tokens with r outside [1/2, 2]
    dp/mean, dp/max          mean and maximum of |pi - mu| = |exp(logp) - exp(logmu)|

    Raises UserError for arrays that do not match, are empty, or hold a number that is not finite.
    """
    logp, logmu = np.asarray(logp, dtype=np.float64), np.asarray(logmu, dtype=np.float64)
    if logp.ndim != 1 or logp.shape != logmu.shape or not len(logp):
        raise UserError(f"logp {list(logp.shape)} and logmu {list(logmu.shape)} must be flat, of one length, and not empty")
    for name, values in (("logp", logp), ("logmu", logmu)):
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise UserError(f"{name}[{bad[0]}] is {values[bad[0]]} ({len(bad)} of {len(values)} trained tokens are not finite)")
    x = logp - logmu
    with np.errstate(over="ignore", invalid="ignore"):  # a ratio beyond the float range is reported as inf
        ratio = np.exp(x)
        quantiles = np.quantile(ratio, list(QUANTILES.values()))
        k3 = np.mean(np.expm1(x) - x)
    scaled = np.exp(x - x.max())  # the effective sample size does not depend on the scale
    shift = np.abs(np.exp(logp) - np.exp(logmu))
    return {
        "kl/k1": float(np.mean(-x)),
        "kl/k3": float(k3),
        **{f"ratio/{name}": float(value) for name, value in zip(QUANTILES, quantiles, strict=True)},
        "ratio/min": float(ratio.min()),
        "ratio/max": float(ratio.max()),
        "ratio/ess": float(scaled.sum() ** 2 / (len(x) * np.square(scaled).sum())),
        "ratio/outside_half_two": float(np.mean((ratio < 0.5) | (ratio > 2.0))),
        "dp/mean": float(shift.mean()),
        "dp/max": float(shift.max()),
    }
