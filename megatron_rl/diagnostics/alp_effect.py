"""The effect of a perturbation on the policy: the shift of probabilities, and the spread of the ratios."""

import numpy as np

from megatron_rl.diagnostics.mismatch import envelope_record, quantile_record


def shift_record(perturbed: np.ndarray, clean: np.ndarray) -> dict[str, float]:
    """Return statistics of the probability shift that noise causes, for the same tokens and weights (arXiv 2603.19470).

    `perturbed` and `clean` are log-probabilities [N] with and without noise.

        alp/shift/p50, p75, p99, max   of |p_perturbed - p_clean|; the paper reports a p75 of 1e-4 to 7e-4
        alp/unmoved                    share of tokens whose log-probability is the same in every bit
    """
    shift = np.abs(np.exp(perturbed.astype(np.float64)) - np.exp(clean.astype(np.float64)))
    p50, p75, p99 = np.quantile(shift, [0.5, 0.75, 0.99])
    return {
        "alp/shift/p50": float(p50),
        "alp/shift/p75": float(p75),
        "alp/shift/p99": float(p99),
        "alp/shift/max": float(shift.max()),
        "alp/unmoved": float(np.mean(perturbed == clean)),
    }


def spread_record(name: str, logp: np.ndarray, logmu: np.ndarray) -> dict[str, float]:
    """Return quantiles and envelope of the ratios pi / mu, under keys like `name/ratio/q01` and `name/envelope/p02/3`.

    Args:
        name: prefix of the keys.
        logp: log-probabilities under pi, [N].
        logmu: log-probabilities under mu, [N].
    """
    logp, logmu = logp.astype(np.float64), logmu.astype(np.float64)
    record = quantile_record(np.exp(logp - logmu)) | envelope_record(logp, logmu)
    return {f"{name}/{key}": value for key, value in record.items()}


def rounding_warning(record: dict[str, float]) -> str | None:
    """Return a warning with the numbers if rounding removes the noise of most tokens, else None.

    `record` is the result of `shift_record`.
    """
    if record["alp/unmoved"] < 0.5:
        return None
    return (
        f"the perturbation is lost in rounding: {record['alp/unmoved']:.0%} of tokens keep their log-probability "
        f"bit for bit, and the 75th percentile of |p_perturbed - p_clean| is {record['alp/shift/p75']:.1e}; "
        "raise alp.sigma_init, or train in fp32"
    )
