"""The noise: published test vectors, one value per element whoever asks, and the moments of a normal distribution."""

import math

import numpy as np
import pytest
import torch

from megatron_rl.perturbation.noise import WORD, NoiseRows, chunks, noise_key, normals, philox4x32

ZEROS = (0x00000000,) * 4, (0x00000000,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
ONES = (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
PI = (
    (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
    (0xA4093822, 0x299F31D0),
    (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
)


def rows_of(*tokens):
    """Rows from (trajectory, position) pairs."""
    ids, positions = zip(*tokens, strict=True)
    return NoiseRows(torch.tensor(positions), torch.tensor(ids))


@pytest.mark.parametrize(("counter", "key", "words"), [ZEROS, ONES, PI], ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_vectors(counter, key, words):
    out = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in out) == words


def test_words_that_broadcast_give_what_whole_tensors_give():
    generator = torch.Generator().manual_seed(1)
    row, column = (torch.randint(0, WORD, shape, generator=generator) for shape in ((5, 1), (1, 7)))
    small = philox4x32((column, row, row + 1 & WORD, row ^ 5), (11, 12))
    whole = philox4x32(tuple(w.expand(5, 7).clone() for w in (column, row, row + 1 & WORD, row ^ 5)), (11, 12))
    assert all(torch.equal(a, b) for a, b in zip(small, whole, strict=True))


def test_a_token_has_its_noise_wherever_it_stands_and_whoever_is_beside_it():
    key = noise_key(3, 4, 5)
    alone = normals(rows_of((2**40 + 7, 19)), key, 64)
    among = normals(rows_of(*((i, 0) for i in range(3000)), (2**40 + 7, 19), (5, 1)), key, 64)
    assert torch.equal(among[3000], alone[0])


def test_pieces_are_the_whole():
    rows, key = rows_of(*((i % 50, i) for i in range(2500))), noise_key(1, 2, 3)
    pieces = list(chunks(rows, key, 64))
    assert len(pieces) > 1
    assert torch.equal(torch.cat([eps for _, eps in pieces]), normals(rows, key, 64))


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"step": 1},
        {"layer": 1},
        {"token": (1, 0)},
        {"token": (0, 1)},
        {"token": (2**32, 0)},
        {"token": (-1, 0)},
    ],
    ids=str,
)
def test_everything_in_the_name_of_an_element_changes_its_noise(other):
    def noise(seed=0, step=0, layer=0, token=(0, 0)):
        return normals(rows_of(token), noise_key(seed, step, layer), 8)

    assert not torch.isclose(noise(), noise(**other)).any()
    assert len(noise().unique()) == 8


def test_no_two_elements_share_key_and_counter():
    """A million names drawn at random, and keys of neighbouring seeds, steps and layers."""
    rng = np.random.default_rng(0)
    names = np.unique(
        np.stack([rng.integers(0, high, 1_000_000) for high in (100, 500, 1 << 40, 32768)], 1).astype(np.int64), axis=0
    )
    keys = {(layer, step): noise_key(9, step, layer) for layer in range(100) for step in range(500)}
    assert len(set(keys.values())) == len(keys)
    words = np.array([[*keys[layer, step], token & WORD, token >> 32, at] for layer, step, token, at in names.tolist()])
    assert len(np.unique(words, axis=0)) == len(names)
    assert len({noise_key(seed, 0, layer) for seed in range(1000) for layer in range(100)}) == 100_000


def test_ten_million_values_have_the_moments_of_independent_normals():
    """Every bound is five standard deviations of the estimate under the normal distribution."""
    hidden, tokens = 1000, 10_000
    rows = NoiseRows(torch.arange(tokens) % 1000, torch.arange(tokens) // 1000)
    eps = normals(rows, noise_key(0, 0, 0), hidden).double()
    n = eps.numel()
    flat = eps.flatten()
    assert abs(flat.mean()) < 5 / math.sqrt(n)
    assert abs(flat.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((flat**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((flat**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for lag in (1, 2, 3, 4, 5, 8, 64):
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 / math.sqrt(n), f"elements {lag} apart"
        assert abs((eps[lag:] * eps[:-lag]).mean()) < 5 / math.sqrt(n), f"positions {lag} apart"
    for other in (noise_key(0, 0, 1), noise_key(0, 1, 0), noise_key(1, 0, 0)):
        again = normals(rows, other, hidden).double()
        assert abs((eps * again).mean()) < 5 / math.sqrt(n)
    assert 4.9 < flat.abs().max() < 5.8, "24 bits reach 5.77"
    counts = torch.histc(flat[flat.abs() < 3], 60, -3, 3)
    edges = torch.linspace(-3, 3, 61, dtype=torch.float64)
    expected = n * torch.diff(torch.special.ndtr(edges))
    chi = ((counts - expected) ** 2 / expected).sum()
    assert chi < 60 + 5 * math.sqrt(120)
