"""Choice of the next token: counter-based noise, inverse CDF, log-probabilities under the distribution sampled from."""

import numpy as np
import torch

GREEDY_BELOW = 1.0e-6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Apply the finalizer of SplitMix64 (Steele, Lea, Flood 2014) to uint64: a bijection with full avalanche."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def row_keys(seed: int, indices: np.ndarray) -> np.ndarray:
    """Return keys [n] uint64: one noise stream for each sample index of a request."""
    base = splitmix64(np.array([seed], dtype=np.uint64) + _GOLDEN)
    return splitmix64(base ^ ((indices.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD1B54A32D192ED03)))


def uniforms(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return noise [R] float64 in [0, 1).

    It is a pure function of a row's key and the position of the token in the row's output.
    """
    bits = splitmix64(keys + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_tokens(
    logits_RV: torch.Tensor,
    temperature: np.ndarray,
    top_p: np.ndarray,
    top_k: np.ndarray,
    noise: np.ndarray,
    most_likely: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Sample one token per row and compute its log-probability under the distribution sampled from.

    The filters top_p and top_k apply jointly and renormalize: a token stays if its rank is below top_k and the mass
    before it does not exceed top_p.

    Args:
        logits_RV: [R, V] float32.
        temperature: [R]. 0 is greedy, with log-probabilities at temperature 1 and without filters, as SGLang reports
            them.
        top_p: [R] in (0, 1].
        top_k: [R]. 0 or less is off.
        noise: [R] in [0, 1).
        most_likely: K, the number of likeliest tokens to return for each row.

    Returns:
        Tokens [R] int64, their log-probabilities [R] float32, and None or, for K > 0, the K likeliest tokens of the
            same distribution: log-probabilities [R, K] float32 in descending order and ids [R, K] int64.
    """
    greedy = temperature < GREEDY_BELOW
    scale = torch.from_numpy(np.where(greedy, 1.0, temperature).astype(np.float32)).to(logits_RV.device)
    logp_RV = torch.log_softmax(logits_RV / scale[:, None], dim=-1)
    filtered = ~greedy & ((top_p < 1.0) | (top_k > 0))
    if filtered.any():
        rows = torch.from_numpy(np.flatnonzero(filtered)).to(logp_RV.device)
        logp_RV[rows] = _filter(logp_RV[rows], top_p[filtered], top_k[filtered])
    if greedy.all():
        tokens = logp_RV.argmax(-1)
    else:
        tokens = _inverse_cdf(logp_RV, noise)
        if greedy.any():
            tokens = torch.where(torch.from_numpy(greedy).to(tokens.device), logp_RV.argmax(-1), tokens)
    logp = logp_RV.gather(1, tokens[:, None])[:, 0]
    if not most_likely:
        return tokens, logp, None
    top_logp, top_ids = logp_RV.topk(most_likely, dim=-1)
    return tokens, logp, (top_logp, top_ids)


def _inverse_cdf(logp_RV: torch.Tensor, noise: np.ndarray) -> torch.Tensor:
    cdf = logp_RV.double().exp().cumsum(-1)
    total = cdf[:, -1:]
    point = torch.from_numpy(noise).to(cdf.device)[:, None] * total
    # The point must stay below the total, so that the step found belongs to a token with mass.
    point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(cdf, point, right=True)[:, 0]
    # The index is out of range only for rows of NaN. Their log-probability is NaN, which the engine reports.
    return found.clamp_(max=logp_RV.shape[1] - 1)


def _filter(logp_RV: torch.Tensor, top_p: np.ndarray, top_k: np.ndarray) -> torch.Tensor:
    vocab = logp_RV.shape[1]
    ordered, order = logp_RV.sort(dim=-1, descending=True)
    mass = ordered.double().exp()
    before = mass.cumsum(-1) - mass
    limit = torch.from_numpy(np.where(top_k > 0, top_k, vocab)).to(logp_RV.device)
    rank = torch.arange(vocab, device=logp_RV.device)
    gone = (rank >= limit[:, None]) | (before > torch.from_numpy(top_p).to(before)[:, None])
    gone[:, 0] = False
    kept = logp_RV.masked_fill(gone.gather(1, order.argsort(-1)), -torch.inf)
    return kept - kept.logsumexp(-1, keepdim=True)
