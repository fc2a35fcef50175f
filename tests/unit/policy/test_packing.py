"""Packing loses nothing, repeats nothing and shifts every column to the position that predicts its token."""

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.errors import UserError
from megatron_rl.policy.attention import AttentionPlan, plan_attention
from megatron_rl.policy.packing import Microbatch, local_positions, shard, stream_unit, zigzag_index
from megatron_rl.policy.packing import pack as pack_share
from megatron_rl.policy.shares import make_shares
from megatron_rl.types import Batch

BUDGET = 48


def batch_of(lengths: list[int], seed: int = 0, *, columns: bool = True) -> Batch:
    """Return random trajectories in which no two tokens and no two values of a column are equal."""
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    mask = (rng.random(total) < 0.6).astype(np.float32)
    mask[cu_seqlens[:-1]] = 0  # a first token is never a response token, because every prompt has a token

    def distinct(*shape: int) -> np.ndarray:
        size = int(np.prod(shape))
        return (-1 - rng.permutation(size).reshape(shape) / max(1, size)).astype(np.float32)

    def column() -> np.ndarray | None:
        return distinct(total) * mask if columns else None

    return Batch(
        ids=rng.permutation(1000)[: len(lengths)],
        groups=np.arange(len(lengths)),
        tokens=rng.permutation(total).astype(np.int32),
        cu_seqlens=cu_seqlens,
        mask=mask,
        rewards=distinct(len(lengths)),
        advantages=rng.standard_normal(len(lengths)).astype(np.float32),
        logmu=column(),
        logold=column(),
        logref=column(),
        staleness=column(),
        topk_ids=rng.permutation(3 * total).reshape(total, 3).astype(np.int32) if columns else None,
        topk_logmu=distinct(total, 3) * mask[:, None] if columns else None,
        routing=rng.permutation(6 * total).reshape(total, 3, 2).astype(np.int32) if columns else None,
    )


def pack(batch: Batch, *, budget: int, align: int, multiple: int, unit: int) -> list[Microbatch]:
    """Return the micro-batches of one replica."""
    (share,) = make_shares(batch, replicas=1, budget=budget, align=align, multiple=multiple, unit=unit, split=True)
    return pack_share(share)


batches = st.builds(batch_of, st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 1000))
aligned = st.sampled_from([1, 2, 4, 8])


@given(batches, aligned, st.integers(1, 4))
def test_every_trained_token_is_a_label_exactly_once_with_its_own_columns(batch, align, multiple):
    micros = pack(batch, budget=BUDGET, align=align, multiple=multiple, unit=BUDGET)
    for name in ("mask", "logmu", "logold", "logref", "staleness", "topk_ids", "topk_logmu"):
        column = getattr(batch, name)
        found = np.zeros_like(column)
        for micro in micros:
            keep = micro.mask > 0
            np.add.at(found, micro.source[keep].numpy(), micro.columns[name][keep].numpy())
        trained = batch.mask > 0
        np.testing.assert_array_equal(found[trained], column[trained])
        assert not found[~trained].any()
    labels = torch.cat([m.labels[m.mask > 0] for m in micros])
    assert sorted(labels.tolist()) == sorted(batch.tokens[batch.mask > 0].tolist())


@given(batches, aligned)
def test_every_token_is_fed_exactly_once(batch, align):
    fed = [m.tokens[m.seq_ids >= 0] for m in pack(batch, budget=BUDGET, align=align, multiple=1, unit=BUDGET)]
    assert sorted(torch.cat(fed).tolist()) == sorted(batch.tokens.tolist())


@given(batches, aligned)
def test_a_label_is_the_next_token_of_the_same_trajectory(batch, align):
    for micro in pack(batch, budget=BUDGET, align=align, multiple=1, unit=BUDGET):
        for at in torch.nonzero(micro.source >= 0)[:, 0].tolist():
            assert micro.labels[at] == micro.tokens[at + 1]
            assert micro.seq_ids[at] == micro.seq_ids[at + 1]
            assert batch.tokens[micro.source[at]] == micro.labels[at]
        last = torch.nonzero((micro.seq_ids >= 0) & (micro.source < 0))[:, 0]
        for at in last.tolist():  # only the last token of a trajectory predicts nothing
            row = micro.seq_ids[at]
            assert micro.positions[at] == batch.lengths[row] - 1


@given(batches, aligned)
def test_positions_count_from_zero_in_every_sequence(batch, align):
    for micro in pack(batch, budget=BUDGET, align=align, multiple=1, unit=BUDGET):
        cu = micro.cu_seqlens
        assert cu[0] == 0 and cu[-1] == BUDGET == len(micro.positions)
        assert torch.equal(micro.positions, torch.cat([torch.arange(b - a) for a, b in pairwise(cu)]))
        assert all(a % align == 0 for a in cu)
        for a, b in pairwise(cu):
            real = micro.seq_ids[a:b]
            assert len(set(real[real >= 0].tolist())) <= 1, "two trajectories share one attention segment"


@given(batches, aligned, st.integers(1, 4))
def test_padding_belongs_to_no_trajectory_and_trains_nothing(batch, align, multiple):
    for micro in pack(batch, budget=BUDGET, align=align, multiple=multiple, unit=BUDGET):
        padding = micro.seq_ids == -1
        assert torch.equal(micro.source[padding], torch.full_like(micro.source[padding], -1))
        names = (
            "mask",
            "advantages",
            "rewards",
            "logmu",
            "logold",
            "logref",
            "staleness",
            "tokens",
            "labels",
            "topk_ids",
        )
        for name in names:
            assert not {**vars(micro), **micro.columns}[name][padding].any()


@given(batches, aligned)
def test_every_token_carries_the_advantage_and_the_reward_of_its_trajectory(batch, align):
    for micro in pack(batch, budget=BUDGET, align=align, multiple=1, unit=BUDGET):
        real = micro.seq_ids >= 0
        row = micro.seq_ids[real].numpy()
        np.testing.assert_array_equal(micro.columns["advantages"][real].numpy(), batch.advantages[row])
        np.testing.assert_array_equal(micro.columns["rewards"][real].numpy(), batch.rewards[row])


@given(batches, aligned)
def test_advantages_of_tokens_take_the_place_of_those_of_trajectories(batch, align):
    values = np.random.default_rng(1).standard_normal(len(batch.tokens)).astype(np.float32)
    given = batch.with_columns(token_advantages=values)
    for micro in pack(given, budget=BUDGET, align=align, multiple=1, unit=BUDGET):
        predicts = micro.source >= 0
        np.testing.assert_array_equal(
            micro.columns["advantages"][predicts].numpy(), given.token_advantages[micro.source[predicts].numpy()]
        )
        assert not micro.columns["advantages"][~predicts].any()


@given(batches, st.integers(1, 6))
def test_the_number_of_microbatches_is_a_multiple_of_what_was_asked(batch, multiple):
    micros = pack(batch, budget=BUDGET, align=1, multiple=multiple, unit=BUDGET)
    assert len(micros) % multiple == 0
    empty = [m for m in micros if not (m.seq_ids >= 0).any()]
    assert len(empty) < multiple


@given(batches, st.sampled_from([1, 2, 6, 16, BUDGET]), st.integers(1, 3))
def test_streams_are_as_short_as_the_fullest_one_allows(batch, unit, multiple):
    micros = pack(batch, budget=BUDGET, align=1, multiple=multiple, unit=unit)
    (length,) = {len(m.tokens) for m in micros}
    fullest = max(int((m.seq_ids >= 0).sum()) for m in micros)
    assert length == -(-fullest // unit) * unit <= BUDGET


def test_streams_are_filled_evenly():
    """First fit alone would make streams of 48 and 12 tokens."""
    micros = pack(batch_of([20, 16, 12, 12]), budget=BUDGET, align=1, multiple=1, unit=1)
    assert [sorted(m.cu_seqlens) for m in micros] == [[0, 20, 32], [0, 16, 28, 32]]


def test_streams_that_cannot_be_even_are_still_as_few_as_first_fit_needs():
    """The longest into the emptiest would make a stream of 56 tokens, where 48 fit."""
    lengths = [24, 24, 16, 16, 16]
    micros = pack(batch_of(lengths), budget=BUDGET, align=1, multiple=1, unit=1)
    assert len(micros) == 2 and {len(m.tokens) for m in micros} == {BUDGET}


@pytest.mark.parametrize(
    ("device", "budget", "tensor", "context", "unit"),
    [
        ("cuda", 4096, 1, 1, 1024),
        ("cuda", 16384, 4, 2, 1024),
        ("cuda", 65536, 8, 8, 8192),  # 128 tokens a rank, as quantized products want
        ("cuda", 6144, 8, 8, 2048),  # the budget has only 96 a rank, which 32 divides
        ("cpu", 4096, 4, 2, 128),
        ("cpu", 2304, 2, 1, 128),
        ("cpu", 416, 2, 1, 32),
        ("cpu", 2304, 3, 1, 384),
        ("cpu", 90, 3, 5, 30),
    ],
)
def test_the_unit_of_streams_divides_the_budget_and_is_cut_evenly_by_the_layout(device, budget, tensor, context, unit):
    assert stream_unit(budget, tensor, context, device) == unit
    assert budget % unit == 0 and unit % (2 * tensor * context) == 0


@given(batches)
def test_streams_but_one_are_more_than_half_full_on_average(batch):
    """First fit would put two streams that are each at most half full into one."""
    micros = pack(batch, budget=BUDGET, align=1, multiple=1, unit=BUDGET)
    assert 2 * batch.lengths.sum() > (len(micros) - 1) * BUDGET


def test_columns_a_batch_does_not_have_are_not_made_up():
    (micro,) = pack(batch_of([3, 4], columns=False), budget=BUDGET, align=1, multiple=1, unit=BUDGET)
    names = ("logmu", "logold", "logref", "staleness", "topk_ids", "topk_logmu")
    assert not set(names) & set(micro.columns)
    assert shard(micro, cp_size=1, cp_rank=0, max_length=BUDGET + 1).topk_labels is None


def test_a_trajectory_longer_than_the_budget_is_refused_by_its_id():
    batch = batch_of([3, BUDGET + 1])
    with pytest.raises(
        UserError, match=rf"trajectory {batch.ids[1]} has 49 tokens, more than .*tokens_per_microbatch = 48"
    ):
        pack(batch, budget=BUDGET, align=1, multiple=1, unit=BUDGET)


def test_a_trajectory_that_only_its_alignment_makes_too_long_is_refused():
    batch = batch_of([BUDGET - 1])
    assert len(pack(batch, budget=BUDGET, align=16, multiple=1, unit=BUDGET)) == 1
    with pytest.raises(UserError, match="47 tokens"):
        pack(batch, budget=BUDGET, align=32, multiple=1, unit=BUDGET)


@given(batches, st.sampled_from([2, 3, 4]))
def test_context_parallel_slices_split_every_sequence_evenly(batch, cp_size):
    budget = 2 * cp_size * 8 * 3
    for micro in pack(batch, budget=budget, align=2 * cp_size, multiple=1, unit=budget):
        slices = [zigzag_index(micro.cu_seqlens, cp_size, rank) for rank in range(cp_size)]
        assert sorted(torch.cat(slices).tolist()) == list(range(budget))
        for a, b in pairwise(micro.cu_seqlens):
            half = (b - a) // (2 * cp_size)
            for rank, index in enumerate(slices):
                mine = index[(index >= a) & (index < b)] - a
                late = 2 * cp_size - 1 - rank
                expected = [*range(rank * half, (rank + 1) * half), *range(late * half, (late + 1) * half)]
                assert mine.tolist() == expected


@given(batches, st.sampled_from([1, 2, 3]))
def test_every_trained_position_is_scored_by_exactly_one_context_parallel_rank(batch, cp_size):
    budget = 2 * cp_size * 20
    for micro in pack(batch, budget=budget, align=2 * cp_size, multiple=1, unit=budget):
        shards = [shard(micro, cp_size=cp_size, cp_rank=r, max_length=budget + 1) for r in range(cp_size)]
        scored = torch.cat([s.index for s in shards])
        assert sorted(scored.tolist()) == torch.nonzero(micro.mask > 0)[:, 0].tolist()
        for rank, piece in enumerate(shards):
            index = zigzag_index(micro.cu_seqlens, cp_size, rank)
            assert torch.equal(index[piece.rows], piece.index)
            assert torch.equal(piece.labels, micro.labels[piece.index])
            assert torch.equal(piece.topk_labels, micro.columns["topk_ids"][piece.index])
            assert torch.equal(piece.tokens[0], micro.tokens[index])
            assert torch.equal(piece.positions[0], micro.positions[index])


def visible(plan: AttentionPlan, rows: int, keys: int, window: int | None) -> torch.Tensor:
    """Return which gathered key each local query may attend to, [rows, keys] bool."""
    seen = torch.zeros(rows, keys, dtype=torch.bool)
    for group, (q, k, _) in zip(plan.groups, plan.parts(torch.arange(rows), *[torch.arange(keys)] * 2), strict=True):
        queries, columns = q.view(group.count, group.rows), k.view(group.count, group.columns)
        held = group.mask_of(window, False, torch.device("cpu"))
        mask = torch.ones(group.rows, group.columns, dtype=torch.bool).tril() if held is None else held
        for q, k in zip(queries, columns, strict=True):
            assert not seen[q].any(), "a query is in two blocks"
            seen[q[:, None], k[None]] = mask
    return seen


@given(batches, st.sampled_from([1, 2, 3]), st.sampled_from([None, 1, 2, 5, 100]))
def test_every_query_sees_its_own_past_within_the_window_and_nothing_else(batch, cp_size, window):
    """By brute force, a query at stream position t sees the keys t - window < s <= t of its own sequence."""
    budget = 2 * cp_size * 20
    micro = pack(batch, budget=budget, align=2 * cp_size, multiple=1, unit=budget)[0]
    cu = micro.cu_seqlens
    sequence = torch.repeat_interleave(torch.arange(len(cu) - 1), torch.tensor(cu).diff())
    gathered = torch.cat([zigzag_index(cu, cp_size, rank) for rank in range(cp_size)])
    for rank in range(cp_size):
        index = zigzag_index(cu, cp_size, rank)
        plan = plan_attention(cu, cp_size, rank)
        past = gathered[None] <= index[:, None]
        if window is not None:
            past &= gathered[None] > index[:, None] - window
        seen = visible(plan, len(index), budget, window)
        assert torch.equal(seen, past & (sequence[gathered][None] == sequence[index][:, None]))
        own = torch.arange(len(index))
        order = torch.cat([q for q, _, _ in plan.parts(own, *[torch.arange(budget)] * 2)])
        assert torch.equal(order if plan.inverse is None else order[plan.inverse], own)


def test_sequences_of_one_length_share_a_group():
    """They lie side by side in a stream, so without context parallelism there are few groups."""
    rng = np.random.default_rng(0)
    batch = batch_of(rng.integers(4, 9, 100).tolist())
    for micro in pack(batch, budget=512, align=1, multiple=1, unit=128):
        lengths = np.diff(micro.cu_seqlens)
        assert len(plan_attention(micro.cu_seqlens, 1, 0).groups) <= len(np.unique(lengths)) + 1


@given(batches, st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]))
def test_every_token_finds_its_own_experts_on_the_one_rank_that_holds_its_hidden_state(batch, cp_size, sp_size):
    """Experts belong to the input token. Unlike labels, they are not shifted."""
    budget = BUDGET + 2 * cp_size * sp_size
    seen = np.zeros(len(batch.tokens), dtype=int)
    unit = 2 * cp_size * sp_size
    for micro in pack(batch, budget=budget // unit * unit, align=2 * cp_size, multiple=1, unit=unit):
        for cp_rank, sp_rank in product(range(cp_size), range(sp_size)):
            own = local_positions(micro, cp_size=cp_size, cp_rank=cp_rank, sp_size=sp_size, sp_rank=sp_rank)
            real = micro.seq_ids[own] >= 0
            flat = batch.cu_seqlens[micro.seq_ids[own][real]] + micro.positions[own][real].numpy()
            assert np.array_equal(micro.columns["routing"][own][real].numpy(), batch.routing[flat])
            assert (micro.columns["routing"][own][~real] == -1).all()
            np.add.at(seen, flat, 1)
    assert (seen == 1).all()
