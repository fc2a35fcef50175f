"""Chunked scores with noise on the logits equal those of eager torch on all logits, and keep nothing of their size."""

import math

import pytest
import torch
import torch.distributed as dist

from megatron_rl.alp.logits import LogitNoise
from megatron_rl.alp.noise import NoiseRows, noise_key, normals
from megatron_rl.config import ParallelConfig
from megatron_rl.policy import parallel
from megatron_rl.policy.device_port import pick_device
from megatron_rl.policy.logprobs import token_scores
from tests.parallel.score_steps import Case

SIGMA, TEMPERATURE, KEY = 0.4, 0.7, noise_key(3, 1, 4)


@pytest.fixture(scope="module")
def alone() -> dist.ProcessGroup:
    parallel.initialize(ParallelConfig(), pick_device("cpu"), seed=0)
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def rows(case):
    return NoiseRows(case.rows, case.rows // 10 + 2**40)


def scored(case, group, chunk_rows, *, learnable=True):
    """Return log-probabilities, entropies, top-k scores, and gradients of hidden states, projection and log_sigma."""
    hidden, weight = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
    log_sigma = torch.full((1,), math.log(SIGMA), requires_grad=learnable)
    out = token_scores(
        hidden[case.rows],
        weight,
        case.labels,
        temperature=TEMPERATURE,
        vocab_size=len(weight),
        group=group,
        chunk_bytes=4 * len(weight) * chunk_rows,
        topk_labels_RK=case.topk,
        noise=LogitNoise(log_sigma, rows(case), KEY),
    )
    torch.autograd.backward(out[:2], [case.grad_logp, case.grad_entropy])
    return [*(t.detach() for t in out), hidden.grad, weight.grad, log_sigma.grad]


def eager(case):
    hidden, weight = (t.double().requires_grad_() for t in (case.hidden, case.weight))
    log_sigma = torch.full((1,), math.log(SIGMA), dtype=torch.float64, requires_grad=True)
    eps = normals(rows(case), KEY, len(weight)).double()
    scores = torch.log_softmax((hidden[case.rows] @ weight.T + log_sigma.exp() * eps) / TEMPERATURE, -1)
    logp, entropy = scores.gather(-1, case.labels[:, None])[:, 0], -(scores.exp() * scores).sum(-1)
    torch.autograd.backward([logp, entropy], [case.grad_logp.double(), case.grad_entropy.double()])
    topk = scores.gather(-1, case.topk)
    return [*(t.detach() for t in (logp, entropy, topk)), hidden.grad, weight.grad, log_sigma.grad]


@pytest.mark.parametrize("chunk_rows", [1, 7, 10_000])
def test_scores_and_gradients_are_those_of_eager_torch_whatever_the_chunk(alone, chunk_rows):
    case = Case.make()
    names = ("logp", "entropy", "topk", "d_hidden", "d_weight", "d_log_sigma")
    for name, found, expected in zip(names, scored(case, alone, chunk_rows), eager(case), strict=True):
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max(), name


def test_a_fixed_sigma_gets_no_gradient_and_changes_no_other(alone):
    case = Case.make()
    fixed, learnt = scored(case, alone, 7, learnable=False), scored(case, alone, 7)
    assert fixed[-1] is None and learnt[-1] is not None
    assert all(torch.equal(a, b) for a, b in zip(fixed[:-1], learnt[:-1], strict=True))


def test_nothing_of_tokens_times_vocabulary_is_kept_for_the_noise(alone):
    case = Case.make(vocab=1000, tokens=800, width=8)
    hidden, weight = case.hidden[case.rows].requires_grad_(), case.weight.clone().requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        token_scores(
            hidden,
            weight,
            case.labels,
            temperature=1.0,
            vocab_size=1000,
            group=alone,
            chunk_bytes=64_000,
            noise=LogitNoise(torch.zeros(1, requires_grad=True), rows(case), KEY),
        )
    assert sum(kept) <= hidden.numel() + weight.numel() + 8 * len(hidden)
