"""Differences of two arms on the same prompts and the same seeds, and intervals of single rates."""

import numpy as np

from megatron_rl.statistics.estimate import Estimate, t_estimate


def prompt_difference(
    first: np.ndarray, second: np.ndarray, *, clusters: np.ndarray | None = None, confidence: float = 0.95
) -> Estimate:
    """Estimate the mean difference of two runs from their rewards on the same prompts.

    The standard error is that of the paired differences, s / sqrt(n), or the clustered one when prompts share a source
    (Miller 2024, "Adding error bars to evals", arXiv 2411.00640, sections 2.2 and 4.2), with the factor G / (G - 1) of
    few clusters and t of n - 1 or G - 1 degrees of freedom. The interval speaks about other prompts for these two
    trained models. It does not speak about other seeds.

    Args:
        first: mean reward of each prompt over its samples, [..., prompts].
        second: the same for the run that is subtracted.
        clusters: number of the source of each prompt, [prompts] int.
        confidence: of the interval.
    """
    delta = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    n = delta.shape[-1]
    if clusters is None:
        groups, sums = n, delta - delta.mean(-1, keepdims=True)
    else:
        names, index = np.unique(clusters, return_inverse=True)
        groups, sums = len(names), (delta - delta.mean(-1, keepdims=True)) @ np.eye(len(names))[index]
    se = np.sqrt((sums**2).sum(-1) * groups / max(groups - 1, 1)) / n
    return t_estimate(delta.mean(-1), se, groups - 1, confidence=confidence, method="paired prompts, one seed")


def seed_difference(deltas: np.ndarray, *, confidence: float = 0.95) -> Estimate:
    """Estimate a mean over seeds by Student's t of the seeds' own values: other seeds, but the same prompts.

    Args:
        deltas: one value a seed, for example the difference of two arms over all prompts, [..., seeds].
        confidence: of the interval.
    """
    deltas = np.asarray(deltas, dtype=np.float64)
    seeds = deltas.shape[-1]
    se = deltas.std(-1, ddof=1) / np.sqrt(seeds) if seeds > 1 else np.full(deltas.shape[:-1], np.nan)[()]
    return t_estimate(deltas.mean(-1), se, seeds - 1, confidence=confidence, method=f"t over {seeds} seed means")


def crossed_difference(deltas: np.ndarray, *, confidence: float = 0.95) -> Estimate:
    """Estimate the mean difference of two arms for other seeds and other prompts.

    Every seed is evaluated on the same prompts, so seeds and prompts are crossed random effects: d_si = delta + S_s +
    P_i + e_si. With the mean squares of the two-way analysis of variance (Searle, Casella, McCulloch, "Variance
    components", 1992, section 4.5),

        Var(mean) = [MS_S + max(0, MS_P - MS_e)] / (seeds * prompts).

    The first term alone is the variance of t on seed means; the second is what the same prompts add in every seed. The
    degrees of freedom are Satterthwaite's. When prompts add nothing the result is t on seed means.

    Args:
        deltas: difference of each seed and prompt, [..., seeds, prompts]; at least two seeds and two prompts.
        confidence: of the interval.
    """
    deltas = np.asarray(deltas, dtype=np.float64)
    seeds, prompts = deltas.shape[-2:]
    value = deltas.mean((-2, -1))
    by_seed = deltas.mean(-1) - value[..., None]
    by_prompt = deltas.mean(-2) - value[..., None]
    total = ((deltas - value[..., None, None]) ** 2).sum((-2, -1))
    ss_seed, ss_prompt = prompts * (by_seed**2).sum(-1), seeds * (by_prompt**2).sum(-1)
    ms_seed, ms_prompt = ss_seed / (seeds - 1), ss_prompt / (prompts - 1)
    rest_df = (seeds - 1) * (prompts - 1)
    ms_rest = np.maximum(total - ss_seed - ss_prompt, 0) / rest_df
    more = ms_prompt > ms_rest
    variance = ms_seed + np.where(more, ms_prompt - ms_rest, 0.0)
    spread = ms_seed**2 / (seeds - 1) + np.where(more, ms_prompt**2 / (prompts - 1) + ms_rest**2 / rest_df, 0.0)
    df = np.where(spread > 0, variance**2 / np.where(spread > 0, spread, 1.0), seeds - 1)
    df = np.maximum(df, seeds - 1)
    method = f"t over {seeds} seed means, with the variance of {prompts} shared prompts"
    return t_estimate(value[()], np.sqrt(variance / (seeds * prompts))[()], df, confidence=confidence, method=method)
