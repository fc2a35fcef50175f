"""Token scores on one rank have the right values and gradients for any chunk size, without a [tokens, vocab] buffer."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_rl.config import ParallelConfig
from megatron_rl.policy import parallel
from megatron_rl.policy.device_port import pick_device
from megatron_rl.policy.logprobs import token_scores
from tests.parallel.score_steps import Case


@pytest.fixture(scope="module")
def alone() -> dist.ProcessGroup:
    """Return a process group of this process alone."""
    parallel.initialize(ParallelConfig(), pick_device("cpu"), seed=0)
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def scored(
    case: Case, group: dist.ProcessGroup, *, rows: int = 10_000, kept: int = 0, temperature: float = 1.0
) -> dict[str, Tensor]:
    """Return the scores and their gradients with respect to hidden states and projection.

    Args:
        case: the inputs.
        group: process group of the vocabulary.
        rows: rows per chunk.
        kept: rows that may be kept for backward.
        temperature: the logits are divided by it.
    """
    hidden, weight = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
    vocab = len(weight)
    logp, entropy, topk = token_scores(
        hidden[case.rows],
        weight,
        case.labels,
        temperature=temperature,
        vocab_size=vocab,
        group=group,
        chunk_bytes=rows * vocab * 4,
        kept_bytes=kept * vocab * 4,
        topk_labels_RK=case.topk,
    )
    torch.autograd.backward([logp, entropy, topk], [case.grad_logp, case.grad_entropy, case.grad_topk])
    assert hidden.grad is not None and weight.grad is not None
    grads = {"d_hidden": hidden.grad, "d_weight": weight.grad}
    return {"logp": logp.detach(), "entropy": entropy.detach(), "topk": topk.detach(), **grads}


def assert_close(
    found: dict[str, Tensor],
    expected: dict[str, np.ndarray],
    tolerance: float = 5e-6,
    summands: dict[str, float] | None = None,
) -> None:
    """Check that found and expected tensors are close.

    Args:
        found: computed tensors by name.
        expected: reference arrays by name.
        tolerance: allowed error, relative to the largest entry.
        summands: per gradient, the largest sum of absolute values before they cancel. An error of 8 float32 steps of
            this sum is allowed.
    """
    for name, value in expected.items():
        # If one token has a probability near 1, the entropy is near 0 but computed from numbers near 1. Two float32
        # steps there are allowed.
        floor = 8 * np.finfo(np.float32).eps * (summands or {}).get(name, 0.0)
        atol = max(tolerance * np.abs(value).max(), 2.4e-7, floor)
        np.testing.assert_allclose(found[name].numpy(), value, atol=atol, err_msg=name)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
def test_scores_and_gradients_are_those_of_log_softmax_in_float64(alone, temperature):
    case = Case.make()
    assert_close(scored(case, alone, temperature=temperature), case.reference(temperature, topk=True))


@given(
    st.integers(2, 300),
    st.integers(2, 60),
    st.integers(1, 70),
    st.integers(0, 70),
    st.integers(0, 99),
    st.floats(0.3, 3),
)
def test_no_chunk_size_and_no_kept_chunk_changes_the_result(alone, vocab, tokens, rows, kept, seed, heat):
    case = Case.make(vocab, tokens, seed=seed)
    # If a token has a probability p near 1, its gradient is 1 - p. It is only as exact as numbers near 1 are.
    from_above_R = (case.grad_logp.abs() + case.grad_entropy.abs() + case.grad_topk.abs().sum(1))[:, None] / heat
    summands = {
        "d_weight": float((from_above_R * case.hidden[case.rows].abs()).sum(0).max()),
        "d_hidden": float(from_above_R.max() * case.weight.abs().max()),
    }
    assert_close(
        scored(case, alone, rows=rows, kept=kept, temperature=heat),
        case.reference(heat, topk=True),
        tolerance=2e-5,
        summands=summands,
    )


@pytest.mark.parametrize("wanted", ["logp", "entropy", "topk"])
def test_each_score_can_be_differentiated_alone(alone, wanted):
    case = Case.make()
    hidden, weight = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
    settings: dict[str, Any] = {"temperature": 0.7, "vocab_size": len(weight), "group": alone, "chunk_bytes": 5000}
    names = ("logp", "entropy", "topk")
    found = token_scores(hidden[case.rows], weight, case.labels, topk_labels_RK=case.topk, **settings)
    scores, grads = dict(zip(names, found, strict=True)), (case.grad_logp, case.grad_entropy, case.grad_topk)
    scores[wanted].backward(dict(zip(names, grads, strict=True))[wanted])
    expected = case.reference(0.7, logp=wanted == "logp", entropy=wanted == "entropy", topk=wanted == "topk")
    assert hidden.grad is not None and weight.grad is not None
    assert_close({"d_hidden": hidden.grad, "d_weight": weight.grad}, {k: expected[k] for k in ("d_hidden", "d_weight")})


def test_further_tokens_change_nothing_else(alone):
    case = Case.make()
    hidden, weight = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
    settings: dict[str, Any] = {"temperature": 0.7, "vocab_size": len(weight), "group": alone, "chunk_bytes": 5000}
    logp, entropy, topk = token_scores(hidden[case.rows], weight, case.labels, topk_labels_RK=case.topk, **settings)
    assert topk.requires_grad and logp.requires_grad and topk.dtype == torch.float32
    plain = token_scores(hidden[case.rows], weight, case.labels, **settings)
    assert len(plain) == 2
    assert torch.equal(logp, plain[0]) and torch.equal(entropy, plain[1])
    twice = token_scores(
        hidden[case.rows], weight, case.labels, topk_labels_RK=case.labels[:, None].expand(-1, 2), **settings
    )
    assert torch.equal(twice[2], logp[:, None].expand(-1, 2)), "the label itself scores as the label"


def test_rows_that_pad_the_vocabulary_take_no_part(alone):
    case = Case.make(vocab=200)
    padded = torch.cat([case.weight, torch.full((56, case.weight.shape[1]), 1e4)]).requires_grad_()
    logp, entropy = token_scores(
        case.hidden[case.rows], padded, case.labels, temperature=1.0, vocab_size=200, group=alone
    )
    (logp.sum() + entropy.sum()).backward()
    expected = case.reference(1.0)
    assert_close({"logp": logp.detach(), "entropy": entropy.detach()}, {k: expected[k] for k in ("logp", "entropy")})
    assert padded.grad is not None and padded.grad[:200].any() and not padded.grad[200:].any()


def test_extreme_logits_stay_finite(alone):
    """A label of probability exp(-3000) keeps its log-probability. A token of probability 1 gives an entropy of 0."""
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [-3000.0], [-3500.0]], requires_grad=True)
    logp, entropy = token_scores(hidden, weight, torch.tensor([0, 1]), temperature=1.0, vocab_size=3, group=alone)
    (logp.sum() + entropy.sum()).backward()
    assert logp.tolist() == [0.0, -3000.0] and entropy.tolist() == [0.0, 0.0]
    assert hidden.grad is not None and weight.grad is not None
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


def test_no_scored_rows_give_empty_scores_and_zero_gradients(alone):
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.long)
    logp, entropy = token_scores(hidden, weight, labels, temperature=1.0, vocab_size=7, group=alone)
    assert logp.shape == entropy.shape == (0,)
    more = labels.reshape(0, 1).expand(0, 6)
    assert token_scores(hidden, weight, labels, temperature=1.0, vocab_size=7, group=alone, topk_labels_RK=more)[
        2
    ].shape == (
        0,
        6,
    )
    (logp.sum() + entropy.sum()).backward()
    assert weight.grad is not None and not weight.grad.any()


def test_bfloat16_weights_give_float32_scores_and_bfloat16_gradients(alone):
    case = Case.make()
    hidden, weight = (t.bfloat16().requires_grad_() for t in (case.hidden, case.weight))
    logp, entropy = token_scores(
        hidden[case.rows], weight, case.labels, temperature=1.0, vocab_size=len(weight), group=alone, chunk_bytes=8000
    )
    assert logp.dtype == entropy.dtype == torch.float32
    torch.autograd.backward([logp, entropy], [case.grad_logp, case.grad_entropy])
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    rounded = replace(case, hidden=hidden.detach().float(), weight=weight.detach().float())
    grads = {"d_hidden": hidden.grad.float(), "d_weight": weight.grad.float()}
    found = {"logp": logp.detach(), "entropy": entropy.detach(), **grads}
    expected = rounded.reference(1.0)
    assert_close(found, {name: expected[name] for name in found}, tolerance=0.02)


class Largest(TorchDispatchMode):
    """Mode that records the number of elements of the largest tensor that any operation creates."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.fixture
def many_tokens() -> Case:
    return Case.make(vocab=1000, tokens=800, width=8)


def test_no_buffer_grows_with_tokens_times_vocabulary(alone, many_tokens):
    """600 scored tokens and 1000 words in chunks of 16 rows create no tensor larger than a chunk in either pass."""
    with Largest() as largest:
        scored(many_tokens, alone, rows=16)
    assert largest.numel == 16 * 1000


def test_the_same_measure_sees_the_buffer_when_the_chunk_takes_all_rows(alone, many_tokens):
    with Largest() as largest:
        scored(many_tokens, alone, rows=600)
    assert largest.numel == 600 * 1000


def kept_numbers(case: Case, group: dist.ProcessGroup, kept: int) -> int:
    """Return how many numbers are kept for backward beside the inputs, in chunks of 16 rows, if `kept` rows may be."""
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    weight = case.weight.clone().requires_grad_()
    hidden = case.hidden[case.rows].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        token_scores(
            hidden,
            weight,
            case.labels,
            temperature=1.0,
            vocab_size=1000,
            group=group,
            chunk_bytes=64_000,
            kept_bytes=kept * 4000,
        )
    return sum(saved) - hidden.numel() - weight.numel()


def test_only_whole_chunks_within_the_budget_are_kept(alone, many_tokens):
    few = kept_numbers(many_tokens, alone, kept=0)
    assert 0 <= few <= 8 * len(many_tokens.rows)
    for rows, kept in ((15, 0), (16, 16), (40, 32)):
        assert kept_numbers(many_tokens, alone, rows) == few + 1000 * kept


@pytest.mark.parametrize("kept", [16, 40, 600])
def test_kept_chunks_change_no_bit(alone, many_tokens, kept):
    found, plain = (scored(many_tokens, alone, rows=16, kept=rows, temperature=0.7) for rows in (kept, 0))
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_backward_may_run_twice_with_kept_chunks(alone):
    case = Case.make()
    weight = case.weight.clone().requires_grad_()
    logp, entropy = token_scores(
        case.hidden[case.rows],
        weight,
        case.labels,
        temperature=1.0,
        vocab_size=len(weight),
        group=alone,
        kept_bytes=1 << 20,
    )
    total = logp.sum() + entropy.sum()
    total.backward(retain_graph=True)
    once = weight.grad.clone()
    total.backward()
    assert torch.equal(weight.grad, 2 * once)
