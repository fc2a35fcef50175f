"""The noise equals published test vectors, depends only on its element, and has the moments of normal numbers."""

import math

import numpy as np
import pytest
import torch

from megatron_rl.alp.noise import WORD, NoiseRows, noise_key, normal_chunks, normals, philox4x32

ZEROS = (0x00000000,) * 4, (0x00000000,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
ONES = (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
PI = (
    (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
    (0xA4093822, 0x299F31D0),
    (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
)


def rows_of(*tokens):
    """Return rows from (trajectory, position) pairs."""
    ids, positions = zip(*tokens, strict=True)
    return NoiseRows(torch.tensor(positions), torch.tensor(ids))


@pytest.mark.parametrize(("counter", "key", "words"), [ZEROS, ONES, PI], ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_vectors(counter, key, words):
    out = philox4x32(tuple(np.array([word], dtype=np.uint32) for word in counter), key)
    assert tuple(int(word[0]) for word in out) == words


def test_words_that_broadcast_give_what_whole_arrays_give():
    rng = np.random.default_rng(1)
    row, column = (rng.integers(0, WORD, shape, dtype=np.uint32, endpoint=True) for shape in ((5, 1), (1, 7)))
    counter = (column, row, row + np.uint32(1), row ^ np.uint32(5))
    before = [words.copy() for words in counter]
    small = philox4x32(counter, (11, 12))
    whole = philox4x32(tuple(np.broadcast_to(words, (5, 7)).copy() for words in counter), (11, 12))
    assert all(np.array_equal(a, b) for a, b in zip(small, whole, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(counter, before, strict=True)), "the counter was overwritten"


@pytest.mark.parametrize(("first", "width"), [(0, 1), (3, 2), (130, 129), (128, 64), (259, 5)])
def test_a_slice_of_the_columns_has_the_noise_of_those_columns(first, width):
    rows, key = rows_of((5, 1), (2**40, 30), (-1, 0)), noise_key(1, 2, 3)
    assert torch.equal(normals(rows, key, width, first), normals(rows, key, 264)[:, first : first + width])


def test_a_token_has_its_noise_wherever_it_stands_and_whoever_is_beside_it():
    key = noise_key(3, 4, 5)
    alone = normals(rows_of((2**40 + 7, 19)), key, 64)
    among = normals(rows_of(*((i, 0) for i in range(3000)), (2**40 + 7, 19), (5, 1)), key, 64)
    assert torch.equal(among[3000], alone[0])


def test_pieces_are_the_whole():
    rows, key = rows_of(*((i % 50, i) for i in range(2500))), noise_key(1, 2, 3)
    pieces = list(normal_chunks(rows, key, 64))
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
    """The test draws a million elements at random, with keys of neighboring seeds, steps and layers."""
    rng = np.random.default_rng(0)
    drawn = np.stack([rng.integers(0, high, 1_000_000) for high in (100, 500, 1 << 40, 32768)], axis=1)
    names = _distinct(drawn)
    keys = np.array([noise_key(9, step, layer) for layer in range(100) for step in range(500)])
    assert len(_distinct(keys)) == len(keys)
    layer, step, token, position = names.T
    of_name = keys[layer * 500 + step]
    assert len(_distinct(np.column_stack([of_name, token & WORD, token >> 32, position]))) == len(names) > 999_000
    assert len({noise_key(seed, 0, layer) for seed in range(1000) for layer in range(100)}) == 100_000


def _distinct(rows: np.ndarray) -> np.ndarray:
    """Return the distinct rows of an integer array. This is far faster than numpy.unique over an axis."""
    ordered = rows[np.lexsort(rows.T)]
    return ordered[np.r_[True, (ordered[1:] != ordered[:-1]).any(1)]]


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
