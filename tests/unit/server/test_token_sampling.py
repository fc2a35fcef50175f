"""The embedded engine draws noise and chooses tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.server.token_sampling import row_keys, sample_tokens, splitmix64, uniforms


def pick(
    logits_RV: torch.Tensor, noise: list[float], temperature: float = 1.0, top_p: float = 1.0, top_k: int = -1
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = len(logits_RV)
    settings = np.full(rows, temperature, np.float32), np.full(rows, top_p), np.full(rows, top_k)
    return sample_tokens(logits_RV, *settings, np.array(noise))[:2]


def test_splitmix64_gives_the_published_sequence() -> None:
    # The first outputs of SplitMix64 seeded with 0: state += 0x9E3779B97F4A7C15 before every output.
    state = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert [hex(value) for value in splitmix64(state).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


@given(st.integers(0, 2**64 - 1), st.integers(0, 1000), st.integers(0, 100_000))
def test_noise_depends_on_seed_sample_and_position_alone(seed: int, index: int, position: int) -> None:
    alone = uniforms(row_keys(seed, np.array([index])), np.array([position]))[0]
    keys = row_keys(seed, np.arange(index + 3))
    among = uniforms(keys, np.full(index + 3, position))[index]
    assert alone == among
    assert 0.0 <= alone < 1.0


def test_noise_is_uniform_over_samples_positions_and_seeds() -> None:
    by_sample = uniforms(row_keys(1, np.arange(20_000)), np.zeros(20_000, np.int64))
    by_position = uniforms(np.repeat(row_keys(1, np.array([0])), 20_000), np.arange(20_000))
    by_seed = np.array([uniforms(row_keys(seed, np.array([0])), np.array([0]))[0] for seed in range(20_000)])
    for noise in (by_sample, by_position, by_seed):
        counts = np.histogram(noise, bins=50, range=(0, 1))[0]
        chi2 = ((counts - 400) ** 2 / 400).sum()
        assert chi2 < 95, "beyond the 99.99 % quantile of chi-square with 49 degrees of freedom"


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
def test_the_token_is_the_step_of_the_cdf_that_holds_the_noise(seed: int, noise: float) -> None:
    logits_RV = torch.randn(1, 17, generator=torch.Generator().manual_seed(seed))
    token = int(pick(logits_RV, [noise])[0])
    cdf = torch.log_softmax(logits_RV, -1)[0].double().exp().cumsum(0)
    point = noise * float(cdf[-1])
    assert (float(cdf[token - 1]) if token else 0.0) <= point <= float(cdf[token])


def test_noise_next_to_one_never_picks_a_token_without_mass() -> None:
    logits_RV = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf], [-torch.inf, 0.0, 0.0, -torch.inf]])
    tokens, logp = pick(logits_RV, [1 - 2**-53, 0.0])
    assert tokens.tolist() == [1, 1]
    assert torch.isfinite(logp).all()


def test_greedy_log_probs_are_at_temperature_one_and_unfiltered() -> None:
    logits_RV = torch.randn(3, 9, generator=torch.Generator().manual_seed(1))
    tokens, logp = pick(logits_RV, [0.9] * 3, temperature=0.0, top_k=2)
    assert tokens.tolist() == logits_RV.argmax(-1).tolist()
    torch.testing.assert_close(logp, torch.log_softmax(logits_RV, -1).amax(-1))


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"), [(1.0, 2, 2), (0.45, -1, 1), (0.55, -1, 2), (0.95, 2, 2), (1.0, 50, 4), (1e-9, -1, 1)]
)
def test_filters_keep_the_likeliest_tokens_and_renormalize(top_p: float, top_k: int, kept: int) -> None:
    p_V = torch.tensor([0.1, 0.5, 0.15, 0.25])
    noise = np.linspace(0, 1, 400, endpoint=False)
    tokens, logp = pick(p_V.log().repeat(400, 1), noise.tolist(), top_p=top_p, top_k=top_k)
    order = p_V.argsort(descending=True)[:kept]
    assert set(tokens.tolist()) == set(order.tolist())
    torch.testing.assert_close(logp.exp(), p_V[tokens] / p_V[order].sum())


def test_rows_with_their_own_settings_do_not_touch_each_other() -> None:
    logits_RV = torch.randn(3, 11, generator=torch.Generator().manual_seed(2))
    noise = np.array([0.3, 0.6, 0.9])
    heat, top_p, top_k = np.array([0.0, 0.7, 1.3], np.float32), np.array([1.0, 0.6, 1.0]), np.array([-1, -1, 4])
    tokens, logp, _ = sample_tokens(logits_RV, heat, top_p, top_k, noise)
    for at in range(3):
        row = slice(at, at + 1)
        alone = sample_tokens(logits_RV[row], heat[row], top_p[row], top_k[row], noise[row])
        assert (int(tokens[at]), float(logp[at])) == (int(alone[0]), pytest.approx(float(alone[1]), abs=1e-6))


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
def test_the_likeliest_tokens_are_those_of_the_distribution_sampled_from(temperature: float) -> None:
    logits_RV = torch.randn(4, 13, generator=torch.Generator().manual_seed(3))
    heat, off = np.full(4, temperature, np.float32), np.full(4, -1)
    tokens, logp, likeliest = sample_tokens(logits_RV, heat, np.ones(4), off, np.linspace(0.1, 0.9, 4), most_likely=13)
    assert likeliest is not None
    logp_RK, ids_RK = likeliest
    assert [sorted(row) for row in ids_RK.tolist()] == [list(range(13))] * 4
    assert (logp_RK.diff(dim=1) <= 0).all()
    want_RV = torch.log_softmax(logits_RV / (temperature or 1.0), -1)
    torch.testing.assert_close(logp_RK, want_RV.gather(1, ids_RK))
    assert torch.equal(logp_RK[ids_RK == tokens[:, None]], logp)


def test_logits_of_nan_give_a_token_with_a_nan_log_prob() -> None:
    tokens, logp = pick(torch.full((1, 5), torch.nan), [0.5])
    assert 0 <= int(tokens) < 5
    assert torch.isnan(logp).all()
