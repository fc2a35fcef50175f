"""Replayed gates and their gradients are those of the given experts under the router's own scores."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

from megatron_rl.policy.routing_replay import RouterReplay

TOKENS, EXPERTS, TOPK = 6, 5, 2


def routed(logits, rows, *, normalized):
    replay = RouterReplay()
    replay.rows = rows
    out = topk_routing_with_score_function(logits, TOPK, use_pre_softmax=not normalized, router_replay=replay)
    return (*out, replay)


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator, dtype=torch.float64, requires_grad=True)
    rows = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(-1)[:, :TOPK]
    weights = torch.randn(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)
    return logits, rows, weights


@given(seed=st.integers(0, 10_000))
def test_gates_over_the_given_experts_have_the_gradients_of_their_softmax(seed):
    """g_i = e^{s_i} / sum_{j in I} e^{s_j}, so dL/ds_i = g_i (w_i - sum_{j in I} g_j w_j) for L = sum_i w_i g_i."""
    logits, rows, w = drawn(seed)
    gates, chosen, _ = routed(logits, rows, normalized=True)
    inside = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter(1, rows, True)
    assert torch.equal(chosen, inside)
    g = torch.where(inside, logits.detach().exp(), 0)
    g = g / g.sum(-1, keepdim=True)
    torch.testing.assert_close(gates.detach(), g, atol=1e-6, rtol=0)
    (gates * w).sum().backward()
    torch.testing.assert_close(logits.grad, g * (w - (g * w).sum(-1, keepdim=True)), atol=1e-6, rtol=0)


@given(seed=st.integers(0, 10_000))
def test_gates_that_are_not_normalized_have_the_gradients_of_the_softmax_over_all(seed):
    logits, rows, w = drawn(seed)
    gates, _, _ = routed(logits, rows, normalized=False)
    p = logits.detach().softmax(-1)
    inside = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64).scatter(1, rows, 1)
    torch.testing.assert_close(gates.detach(), p * inside, atol=1e-6, rtol=0)
    (gates * w).sum().backward()
    torch.testing.assert_close(
        logits.grad, p * (w * inside - (p * w * inside).sum(-1, keepdim=True)), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("normalized", [True, False])
def test_rows_of_minus_one_choose_as_without_replay_bit_for_bit(normalized):
    logits, rows, _ = drawn(1)
    free, map_free, _ = routed(logits, None, normalized=normalized)
    rows[::2] = -1
    gates, chosen, replay = routed(logits, rows, normalized=normalized)
    assert torch.equal(gates[::2], free[::2]) and torch.equal(chosen[::2], map_free[::2])
    assert not torch.equal(chosen[1::2], map_free[1::2])
    assert replay.counts.tolist()[0] == TOKENS // 2


def test_a_choice_agrees_whatever_the_order_of_its_experts():
    logits, _, _ = drawn(2)
    rows = logits.topk(TOPK).indices.flip(-1).clone()
    rows[0] = logits[0].topk(EXPERTS).indices[-TOPK:]
    assert routed(logits, rows, normalized=True)[2].counts.tolist() == [TOKENS, TOKENS - 1]


def test_nothing_is_counted_where_no_gradient_is_made():
    logits, rows, _ = drawn(3)
    with torch.no_grad():
        assert routed(logits, rows, normalized=True)[2].counts is None
