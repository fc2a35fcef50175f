"""Replicas get all rows of a batch once, each replica its own, and no more bytes than these rows have."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.policy.packing import pack
from megatron_rl.policy.shares import Share, make_shares
from tests.unit.policy.test_packing import batch_of, batches

BUDGET = 64


def shares_of(
    batch, replicas: int, multiple: int = 1, align: int = 1, unit: int = 16, split: bool = True
) -> list[Share]:
    return make_shares(batch, replicas=replicas, budget=BUDGET, align=align, multiple=multiple, unit=unit, split=split)


@given(batches, st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 4]), st.booleans())
def test_every_row_is_in_one_share_with_its_own_entries(batch, replicas, multiple, align, split):
    shares = shares_of(batch, replicas, multiple, align, split=split)
    assert sorted(np.concatenate([share.rows for share in shares]).tolist()) == list(range(len(batch)))
    assert {len(share.streams) for share in shares} == {len(shares[0].streams)}
    assert len(shares[0].streams) % multiple == 0 and {share.length for share in shares} == {shares[0].length}
    for share in shares:
        assert sorted(row for rows in share.streams for row in rows) == list(range(len(share.batch)))
        np.testing.assert_array_equal(share.batch.ids, batch.ids[share.rows])
        np.testing.assert_array_equal(share.starts, batch.cu_seqlens[share.rows])
        expected = batch.select(share.rows)
        for name, values in share.batch.columns.items():
            np.testing.assert_array_equal(values, getattr(expected, name))


@given(batches, st.integers(1, 5))
def test_streams_point_into_the_whole_batch_however_many_replicas_there_are(batch, replicas):
    sources = []
    for micro in (micro for share in shares_of(batch, replicas) for micro in pack(share)):
        scored = np.flatnonzero(np.asarray(micro.mask) > 0)
        source = np.asarray(micro.source)[scored]
        np.testing.assert_array_equal(np.asarray(micro.labels)[scored], batch.tokens[source])
        np.testing.assert_array_equal(np.asarray(micro.ids)[scored], np.repeat(batch.ids, batch.lengths)[source])
        sources.extend(source.tolist())
    assert sorted(sources) == np.flatnonzero(batch.mask > 0).tolist()


@pytest.mark.parametrize(
    ("replicas", "streams", "length"), [(1, 3, 60), (2, 4, 60), (3, 3, 60), (4, 4, 60), (8, 8, 40)]
)
def test_streams_become_shorter_where_a_replica_would_compute_padding_alone(replicas, streams, length):
    """Nine responses of 20 tokens fill three streams of 64."""
    shares = shares_of(batch_of([20] * 9), replicas, unit=1)
    assert {len(share.streams) for share in shares} == {streams // replicas}
    assert all(rows for share in shares for rows in share.streams) and shares[0].length == length


def test_one_stream_is_cut_into_one_for_each_replica():
    shares = shares_of(batch_of([8] * 8), 4, unit=1)
    assert [(len(share.batch), share.length) for share in shares] == [(2, 16)] * 4


@given(batches, st.integers(2, 5), st.integers(1, 3))
def test_streams_that_are_not_split_do_not_depend_on_the_layout(batch, replicas, multiple):
    alone = pack(shares_of(batch, 1, split=False)[0])
    several = [pack(share) for share in shares_of(batch, replicas, multiple, split=False)]
    together = [micro for turn in zip(*several, strict=True) for micro in turn]
    for one, other in zip(alone, together, strict=False):
        for name in ("tokens", "labels", "positions", "seq_ids", "ids", "source", "mask"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert all(int(micro.mask.sum()) == 0 for micro in together[len(alone) :])


@pytest.mark.parametrize("replicas", [2, 4])
def test_shares_have_the_bytes_of_the_batch_divided_by_replicas(replicas):
    batch = batch_of([30] * 200)
    whole = len(pickle.dumps(batch))
    sizes = [len(pickle.dumps(share)) for share in shares_of(batch, replicas)]
    assert max(sizes) < 1.1 * whole / replicas
    assert len(pickle.dumps(batch.without_rows())) < whole / 50


def test_a_batch_without_rows_has_the_same_columns():
    batch = batch_of([3, 5])
    empty = batch.without_rows()
    assert len(empty) == len(empty.tokens) == 0 and empty.columns.keys() == batch.columns.keys()
    for name, values in empty.columns.items():
        assert values.dtype == getattr(batch, name).dtype and values.shape[1:] == getattr(batch, name).shape[1:]
