"""The attribution finds the sources of the mismatch, the tensors that differ, and the layers at which errors jump."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.diagnostics import RunLog, read_log
from megatron_rl.diagnostics.score_chain import (
    SOURCES,
    ScoreChain,
    compare_tensors,
    first_diverging_layer,
    largest_source,
    layer_verdict,
    sync_verdict,
)
from megatron_rl.errors import UserError

KEYS = ("mean_abs", "q99", "max", "rms", "kl", "share")


def chain_of(deltas: dict[str, list[float]], tokens: int) -> ScoreChain:
    """Return a chain that begins at -1 and in which the named sources add the given numbers."""
    steps = [np.full(tokens, -1.0), *(np.array(deltas.get(name, [0.0] * tokens)) for name in SOURCES)]
    return ScoreChain.of(np.cumsum(steps, axis=0))


@given(st.lists(st.lists(st.floats(-20, 0), min_size=8, max_size=8), min_size=1, max_size=30))
def test_what_the_sources_add_sums_to_the_log_ratio_token_by_token_and_so_do_kl_and_shares(rows):
    chain = ScoreChain.of(np.array(rows).T)
    total = np.sum(list(chain.deltas.values()), axis=0)
    np.testing.assert_allclose(total, chain.total, atol=1e-12)
    record = chain.record()
    assert sum(record[f"attribution/{name}/kl"] for name in SOURCES) == pytest.approx(
        record["attribution/total/kl"], abs=1e-9
    )
    if np.any(np.abs(chain.total) > 1e-3):
        assert sum(record[f"attribution/{name}/share"] for name in SOURCES) == pytest.approx(1.0, abs=1e-4)


def test_each_number_is_its_formula():
    record = chain_of({"weight": [0.3, -0.1, 0.0, 0.0], "staleness": [0.1, 0.1, 0.2, 0.0]}, 4).record()
    assert record["attribution/tokens"] == 4
    assert [record[f"attribution/weight/{key}"] for key in KEYS[:5]] == pytest.approx(
        [0.1, np.quantile([0.3, 0.1, 0, 0], 0.99), 0.3, math.sqrt(0.1 / 4), -0.05]
    )
    square = (0.4**2 + 0 + 0.2**2) / 4
    assert record["attribution/weight/share"] == pytest.approx((0.3 * 0.4) / 4 / square)
    assert record["attribution/total/share"] == pytest.approx(1)
    assert all(record[f"attribution/kernel/{key}"] == 0 for key in KEYS)


def test_the_verdict_names_the_source_that_is_largest_not_the_one_that_happens_to_remain():
    record = chain_of({"activation": [0.5, -0.5], "recipe": [-0.49, 0.49], "decode": [0.1, 0.1]}, 2).record()
    assert largest_source(record).startswith("the largest source is activation")
    assert "bit for bit" in largest_source(chain_of({}, 3).record())


def test_the_log_takes_the_record(tmp_path):
    record = {"kind": "attribution", "step": 3} | chain_of({"sync": [1.0]}, 1).record()
    with RunLog(tmp_path) as log:
        log.append(record)
    assert read_log(tmp_path) == [record]


def test_scores_that_form_no_chain_are_refused():
    good = np.zeros((8, 3))
    with pytest.raises(UserError, match="8 scores"):
        ScoreChain.of(good[:7])
    with pytest.raises(UserError, match="'sync' have shape"):
        ScoreChain.of([*good[:4], np.zeros(2), *good[5:]])
    with pytest.raises(UserError, match="'logmu' have shape"):
        ScoreChain.of(np.zeros((8, 0)))
    with pytest.raises(UserError, match="'staleness' hold numbers that are not finite"):
        ScoreChain.of([*good[:7], np.full(3, np.nan)])


def test_equal_tensors_are_no_fault_whatever_their_dtype():
    sent = torch.randn(4, 5).bfloat16()
    assert compare_tensors("e", "a", sent.float(), sent) is None


def test_a_tensor_off_by_a_factor_is_said_to_be_just_that():
    sent = torch.randn(40, 50)
    fault = compare_tensors("e", "a.weight", 2 * sent, sent)
    assert fault is not None and (fault.error, fault.factor) == (pytest.approx(1), pytest.approx(2))
    assert "a.weight on e" in str(fault) and "2 times what was sent" in str(fault)


def test_one_wrong_element_and_a_number_that_is_none_are_found():
    sent = torch.ones(10, 10)
    held = sent.clone()
    held[3, 4] = 1 + 1e-6
    fault = compare_tensors("e", "a", held, sent)
    assert fault is not None and fault.share == pytest.approx(0.01) and fault.error == pytest.approx(1e-7, rel=0.1)
    assert "times" not in str(fault)
    held[3, 4] = math.nan
    assert compare_tensors("e", "a", held, sent) is not None
    assert compare_tensors("e", "a", None, sent) is not None and compare_tensors("e", "a", sent[:5], sent) is not None
    assert compare_tensors("e", "a", sent, 0 * sent) is not None


def test_the_sync_verdict_names_the_worst_tensors_first():
    sent = torch.randn(8, 8)
    faults = [compare_tensors("e", f"t{i}", sent * factor, sent) for i, factor in enumerate((1.1, 3.0, 1.5, 1.2))]
    text = sync_verdict([fault for fault in faults if fault is not None])
    assert text.index("t1") < text.index("t2") < text.index("t3") and "t0" not in text and "and 1 more" in text
    assert "whole" in sync_verdict([])


@pytest.mark.parametrize(
    ("errors", "layer"),
    [
        ([1e-7, 2e-7, 3e-7], None),
        ([1e-7, 2e-7, 0.4, 0.5], 2),
        ([0.3, 0.35, 0.4], 0),
        ([2e-3, 5e-3, 2e-2, 0.5], 0),  # with the floor of float32; the test below uses that of bfloat16
        ([1e-7, math.nan, 0.1], 1),
    ],
)
def test_the_layer_is_the_first_at_which_the_error_is_five_times_what_it_was(errors, layer):
    assert first_diverging_layer(errors, 1e-6) == layer
    assert ("agree" if layer is None else f"part at layer {layer}") in layer_verdict(errors, 1e-6)


def test_errors_below_what_rounding_gives_do_not_count():
    assert first_diverging_layer([2e-3, 5e-3, 2e-2, 0.5], 3e-2) == 3
