"""A layout splits Hugging Face tensors into tensor-parallel shards and merges them again, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.errors import ConfigError
from megatron_rl.weights.layouts import (
    QKV,
    GateUp,
    Layout,
    Replicated,
    RowParallel,
    VocabParallel,
    check_divides,
    padded_vocab,
)

SIZES = st.sampled_from([1, 2, 4, 8])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SMALL = st.integers(1, 5)


class Source:
    """A stored tensor that counts how many elements are read from it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.read = tensor, 0

    def __call__(self, start: int, stop: int, dim: int = 0) -> torch.Tensor:
        part = self.tensor.narrow(dim, start, stop - start)
        self.read += part.numel()
        return part


def bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return random bits: every pattern is possible, including NaN payloads and negative zeros."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
        .view(dtype)
        .reshape(shape)
    )


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, int]:
    size, a, b, c = draw(SIZES), draw(SMALL), draw(SMALL), draw(SMALL)
    kind = draw(st.sampled_from(["replicated", "row", "vocab", "qkv", "qkv_bias", "qkv_few_groups", "gate_up"]))
    groups = size * a
    return {
        "replicated": Replicated((a * b,)),
        "row": RowParallel((a, size * b), "columns"),
        "vocab": VocabParallel(draw(st.integers(1, 40)), b),
        "qkv": QKV(groups * b, groups, 2 * c, (a + c,)),
        "qkv_few_groups": QKV(size * b, max(1, size // 2), 2 * c, (a + c,)),
        "qkv_bias": QKV(groups * b, groups, 2 * c, ()),
        "gate_up": GateUp(size * a, b),
    }[kind], size


@settings(max_examples=150, deadline=None)
@given(layouts(), DTYPES, st.integers(0, 2**31))
def test_merging_what_each_rank_read_gives_the_stored_bytes(
    case: tuple[Layout, int], dtype: torch.dtype, seed: int
) -> None:
    layout, size = case
    layout.check(size)
    stored = [bits(shape, dtype, seed + index) for index, shape in enumerate(layout.shapes)]
    shards = [layout.read([Source(tensor) for tensor in stored], rank, size) for rank in range(size)]
    assert all(shard.shape == layout.local_shape(size) and shard.is_contiguous() for shard in shards)
    merged = layout.merge(shards)
    assert len(merged) == len(stored)
    for before, after in zip(stored, merged, strict=True):
        assert after.shape == before.shape and after.dtype == before.dtype and after.is_contiguous()
        assert torch.equal(as_bytes(before), as_bytes(after))


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_ranks_together_read_each_stored_element_once(case: tuple[Layout, int]) -> None:
    layout, size = case
    sources = [Source(torch.zeros(shape)) for shape in layout.shapes]
    for rank in range(size):
        layout.read(sources, rank, size)
    times = size if layout.replicated else 1
    assert [source.read for source in sources] == [times * source.tensor.numel() for source in sources]


def test_the_qkv_parameter_holds_query_heads_then_key_then_value_of_each_group() -> None:
    layout = QKV(heads=4, groups=2, head_dim=1, inner=())
    stored = [torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 20]), torch.tensor([100.0, 200])]
    sources = [Source(tensor) for tensor in stored]
    assert layout.read(sources, 0, 1).tolist() == [1, 2, 10, 100, 3, 4, 20, 200]
    assert layout.read(sources, 1, 2).tolist() == [3, 4, 20, 200]


def test_the_gated_mlp_parameter_holds_a_rank_s_gate_rows_then_its_up_rows() -> None:
    layout = GateUp(4, 1)
    gate, up = torch.arange(4.0)[:, None], torch.arange(4.0)[:, None] + 10
    assert layout.read([Source(gate), Source(up)], 1, 2).flatten().tolist() == [2, 3, 12, 13]


def test_a_vocabulary_is_padded_with_zero_rows_that_are_never_merged() -> None:
    layout = VocabParallel(5, 2)
    stored = torch.ones(5, 2)
    shards = [layout.read([Source(stored)], rank, 4) for rank in range(4)]
    assert padded_vocab(5, 4) == 8
    assert [shard.sum().item() for shard in shards] == [4, 4, 2, 0]
    shards[3].fill_(7.0)
    assert torch.equal(layout.merge(shards)[0], stored)


@pytest.mark.parametrize(
    ("layout", "size", "key", "nearest"),
    [
        (QKV(6, 2, 8, (4,)), 4, "num_attention_heads = 6", 3),
        (GateUp(96, 8), 5, "intermediate_size = 96", 4),
        (RowParallel((8, 6), "width"), 4, "width = 6", 3),
    ],
)
def test_a_size_that_does_not_divide_is_refused_naming_the_key_and_the_nearest_that_works(
    layout: Layout, size: int, key: str, nearest: int
) -> None:
    with pytest.raises(ConfigError, match=rf"parallel\.tensor = {size} .*{key}.* works is {nearest}$"):
        layout.check(size)


@pytest.mark.parametrize(
    ("layout", "size", "words"),
    [
        (QKV(12, 6, 8, (4,)), 4, "= 4 neither divides num_key_value_heads = 6"),
        (QKV(16, 1, 2, (4,)), 16, "= 16 does not divide the 36 rows"),
    ],
)
def test_key_value_heads_that_ranks_cannot_share_are_refused(layout: Layout, size: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        layout.check(size)


def test_the_nearest_size_divides_every_count_of_the_model() -> None:
    with pytest.raises(ConfigError, match=r"num_key_value_heads = 4.* works is 4$"):
        check_divides({"num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 96}, 8)
