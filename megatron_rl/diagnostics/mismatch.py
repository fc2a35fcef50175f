"""Statistics, mainly of the tails, of how the trainer's policy pi differs from mu, which sampled the tokens."""

import json

import numpy as np

from megatron_rl.errors import UserError

QUANTILES = {"q01": 0.01, "q05": 0.05, "q25": 0.25, "q50": 0.50, "q75": 0.75, "q95": 0.95, "q99": 0.99}
BINS = 10
WORST = 5


def ratio_record(logp: np.ndarray, logmu: np.ndarray) -> dict[str, float]:
    """Return statistics of the importance ratios r = exp(x), x = logp - logmu, of trained tokens; computed in float64.

    `logp` and `logmu` [N] are log-probabilities of the sampled tokens, in nats. The tokens are drawn from mu.

        kl/k1                    mean(-x): unbiased estimate of KL(mu || pi) in nats per token; may be negative
        kl/k3                    mean(exp(x) - 1 - x): also unbiased, every term >= 0
        chi2                     mean((r - 1)^2): estimate of chi-squared(pi || mu). It is heavy-tailed: a few tokens
                                 make up most of it, and its variance may be infinite. The value of one step therefore
                                 means little, and a low value proves nothing
        token_mult_prob_error    mean(exp(|x|)): the multiplicative error of sampled tokens' probabilities, at least 1,
                                 as NeMo-RL defines it (its guide "Add New Models", log-probability consistency)
        ratio/q01 ... q99        quantiles of r (linear interpolation); ratio/min, ratio/max
        ratio/ess                (sum r)^2 / (N sum r^2): effective share of the sample, in (0, 1], 1 if all ratios are
                                 equal
        ratio/outside_half_two   share of tokens with r outside [1/2, 2]
        dp/mean, dp/max          mean and maximum of |pi - mu| = |exp(logp) - exp(logmu)|
        envelope/p02/k, p98/k    see `envelope_record`

    Raises:
        UserError: the arrays do not match, are empty, or contain a number that is not finite.
    """
    logp, logmu = np.asarray(logp, dtype=np.float64), np.asarray(logmu, dtype=np.float64)
    if logp.ndim != 1 or logp.shape != logmu.shape or not len(logp):
        raise UserError(
            f"logp {list(logp.shape)} and logmu {list(logmu.shape)} must be flat, of one length, and not empty"
        )
    for name, values in (("logp", logp), ("logmu", logmu)):
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise UserError(
                f"{name}[{bad[0]}] is {values[bad[0]]} ({len(bad)} of {len(values)} trained tokens are not finite)"
            )
    x = logp - logmu
    with np.errstate(over="ignore", invalid="ignore"):  # a ratio beyond the float range is reported as inf
        ratio = np.exp(x)
        excess = np.expm1(x)
        k3, chi2 = np.mean(excess - x), np.mean(np.square(excess))
        multiplied = np.mean(np.exp(np.abs(x)))
        quantiles, envelope = quantile_record(ratio), envelope_record(logp, logmu)
    scaled = np.exp(x - x.max())  # the effective sample size does not depend on the scale
    shift = np.abs(np.exp(logp) - np.exp(logmu))
    return {
        "kl/k1": float(np.mean(-x)),
        "kl/k3": float(k3),
        "chi2": float(chi2),
        "token_mult_prob_error": float(multiplied),
        **quantiles,
        "ratio/min": float(ratio.min()),
        "ratio/max": float(ratio.max()),
        "ratio/ess": float(scaled.sum() ** 2 / (len(x) * np.square(scaled).sum())),
        "ratio/outside_half_two": float(np.mean((ratio < 0.5) | (ratio > 2.0))),
        "dp/mean": float(shift.mean()),
        "dp/max": float(shift.max()),
        **envelope,
    }


def quantile_record(ratio: np.ndarray) -> dict[str, float]:
    """Return the quantiles ratio/q01 ... ratio/q99 of ratios [N]."""
    values = np.quantile(ratio, list(QUANTILES.values()))
    return {f"ratio/{name}": float(value) for name, value in zip(QUANTILES, values, strict=True)}


def envelope_record(logp: np.ndarray, logmu: np.ndarray) -> dict[str, float]:
    """Return the 2nd and 98th percentile of the ratios pi / mu in each of 10 bins of mu.

    Bin k contains the tokens whose mu lies in [k / 10, (k + 1) / 10); its keys are envelope/p02/k and envelope/p98/k.
    Bins without tokens are left out. `logp` and `logmu` are [N] float64.
    """
    bins = np.minimum((np.exp(logmu) * BINS).astype(np.int8), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    ends = np.cumsum(counts)
    grouped = np.exp(logp - logmu)[np.argsort(bins, kind="stable")]  # int8 keys: numpy uses a radix sort
    record: dict[str, float] = {}
    for k in np.flatnonzero(counts).tolist():
        low, high = np.quantile(grouped[ends[k] - counts[k] : ends[k]], [0.02, 0.98])
        record |= {f"envelope/p02/{k}": float(low), f"envelope/p98/{k}": float(high)}
    return record


def worst_record(
    logp: np.ndarray, logmu: np.ndarray, rows: np.ndarray, ids: np.ndarray, prompt_ids: tuple[str, ...]
) -> dict[str, list[float] | list[int] | str]:
    """Return the (at most 5) trajectories with the largest |log ratio| of one token, worst first.

        worst/max          max |logp - logmu| over the trajectory's tokens, in nats
        worst/mean         mean of |logp - logmu|
        worst/trajectory   the trajectories' ids in the run
        worst/prompt_ids   the task's names of their prompts, as the text of a JSON list

    Args:
        logp: [N], of trained tokens.
        logmu: [N], of trained tokens.
        rows: [N], the trajectory of each token, an index into `ids` and `prompt_ids`.
        ids: [B], trajectory ids in the run.
        prompt_ids: B names of prompts.
    """
    size = np.abs(np.asarray(logp, dtype=np.float64) - np.asarray(logmu, dtype=np.float64))
    largest = np.full(len(ids), -np.inf)
    np.maximum.at(largest, rows, size)
    tokens = np.bincount(rows, minlength=len(ids))
    mean = np.bincount(rows, weights=size, minlength=len(ids)) / np.maximum(tokens, 1)
    order = np.argsort(-largest, kind="stable")[:WORST]
    order = order[tokens[order] > 0]
    return {
        "worst/max": largest[order].tolist(),
        "worst/mean": mean[order].tolist(),
        "worst/trajectory": ids[order].tolist(),
        "worst/prompt_ids": json.dumps([prompt_ids[row] for row in order] if prompt_ids else []),
    }
