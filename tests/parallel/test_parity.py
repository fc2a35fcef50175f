"""One training step is the same under every parallel layout, and the same as in plain transformers and torch."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.parallel.steps import LENGTHS, OPTIMIZER, make_batch

TEMPERATURE, DELTA = 0.7, 0.15
FULL = {"recompute": "full"}
TWO = {
    "tp2": {"tensor": 2},
    "tp2_sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "pp2_recompute": {"pipeline": 2, **FULL},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "pp2_vpp2_recompute": {"pipeline": 2, "virtual_pipeline": 2, **FULL},
    "cp2": {"context": 2},
    "dp2": {"data": 2},
}
FOUR = {
    "tp2_pp2_sp": {"tensor": 2, "pipeline": 2, "sequence": True},
    "tp2_pp2_sp_recompute": {"tensor": 2, "pipeline": 2, "sequence": True, **FULL},
    "tp2_cp2_sp_recompute": {"tensor": 2, "context": 2, "sequence": True, **FULL},
    "tp2_dp2": {"tensor": 2, "data": 2},
    "tp4": {"tensor": 4},
}


def reference_step(folder, perturbation=None):
    """Make the update in plain code: one sequence at a time through transformers, torch autograd, torch AdamW.

    perturbation: object that adds hooks to the model, gets the id of each trajectory, and has its own parameters.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = make_batch()
    own = {} if perturbation is None else perturbation.attach(model)
    logps, entropies, loss = [], [], torch.zeros(())
    trained = [batch.mask[a:b].sum() for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)]
    sequences = sum(n > 0 for n in trained)
    for i, n in enumerate(LENGTHS):
        span = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1])
        tokens = torch.from_numpy(batch.tokens[span].astype(np.int64))
        if perturbation is not None:
            perturbation.trajectory = int(batch.ids[i])
        scores = torch.log_softmax(model(tokens[None]).logits[0] / TEMPERATURE, -1)
        logp = torch.cat([torch.zeros(1), scores[:-1].gather(-1, tokens[1:, None])[:, 0]])
        entropy = torch.cat([torch.zeros(1), -(scores.exp() * scores).sum(-1)[:-1]])
        mask, logmu = torch.from_numpy(batch.mask[span]), torch.from_numpy(batch.logmu[span])
        ratio, advantage = torch.exp((logp - logmu).clamp(-20, 20)), float(batch.advantages[i])
        token_loss = -advantage * ratio + abs(advantage) * logmu.exp() * (ratio - 1) ** 2 / (2 * DELTA)
        if trained[i] > 0:
            loss = loss + (token_loss * mask).sum() / mask.sum() / sequences
        logps.append((logp * mask).detach())
        entropies.append((entropy * mask).detach())
        assert n == len(tokens)
    loss.backward()
    named = {**dict(model.named_parameters()), **own}
    grads = {name: p.grad.clone() for name, p in named.items()}
    norm = torch.sqrt(sum((g.double() ** 2).sum() for g in grads.values())).item()
    for p in named.values():
        p.grad.mul_(min(1.0, OPTIMIZER["grad_clip"] / (norm + 1e-6)))
    # The biases of all experts of a layer may be one matrix. They are vectors all the same.
    vector = {name: p.ndim == 1 or name.endswith("_bias") for name, p in model.named_parameters()}
    matrices = [p for name, p in model.named_parameters() if not vector[name]]
    vectors = [p for name, p in model.named_parameters() if vector[name]]
    torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": OPTIMIZER["weight_decay"]},
            {"params": vectors, "weight_decay": 0.0},
            *([perturbation.group(own)] if own else []),
        ],
        lr=OPTIMIZER["lr"],
        eps=OPTIMIZER["eps"],
    ).step()
    return {
        "grads": {k: v.numpy() for k, v in grads.items()},
        "weights": {k: v.detach().numpy() for k, v in named.items()},
        "loss": loss.item(),
        "grad_norm": norm,
        "logp": torch.cat(logps).numpy(),
        "entropy": torch.cat(entropies).numpy(),
    }


@pytest.fixture(scope="module")
def reference(qwen3):
    return reference_step(qwen3)


@pytest.fixture(scope="module")
def reference_tied(qwen3_tied):
    return reference_step(qwen3_tied)


def worst(a, b):
    """Return the largest difference of a tensor, relative to the reference tensor's largest entry, and its name."""
    assert set(a) == set(b), sorted(set(a) ^ set(b))
    return max((float(np.abs(a[k] - b[k]).max() / (np.abs(b[k]).max() + 1e-12)), k) for k in b)


def assert_same_step(result, reference):
    assert abs(result["loss"] - reference["loss"]) <= 1e-6 * max(1.0, abs(reference["loss"]))
    np.testing.assert_allclose(result["logp"], reference["logp"], atol=1e-5)
    np.testing.assert_allclose(result["entropy"], reference["entropy"], atol=2e-5)
    assert worst(result["grads"], reference["grads"]) < (1e-5,)
    assert abs(result["grad_norm"] / reference["grad_norm"] - 1) < 1e-5
    assert reference["grad_norm"] > OPTIMIZER["grad_clip"], "the clip must be active for this test to say anything"
    assert worst(result["weights"], reference["weights"]) < (1e-5,)
    assert result["replicas_differ"] == 0.0


@pytest.mark.parametrize("layout", TWO.values(), ids=TWO)
def test_two_rank_layouts_make_the_reference_step(two_ranks, qwen3, reference, layout):
    assert_same_step(two_ranks.run("tests.parallel.steps", "step", model=qwen3, layout=layout)[0], reference)


@pytest.mark.parametrize("layout", FOUR.values(), ids=FOUR)
def test_four_rank_layouts_make_the_reference_step(four_ranks, qwen3, reference, layout):
    assert_same_step(four_ranks.run("tests.parallel.steps", "step", model=qwen3, layout=layout)[0], reference)


OLD = {"name": "grpo", "ratio_denominator": "trainer_old", "log_ratio_coef": 0.1}
# A budget that a response's tokens share, and a penalty on every token.
PREFIXES = {"name": "cppo", "delta": 0.02, "delta_b": 0.0, "log_ratio_coef": 0.1}


@pytest.fixture(scope="module")
def prefixes(two_ranks, qwen3):
    """Return the steps of two replicas: with the budget as it is, and with equal weights in a response."""
    methods = (PREFIXES, {**PREFIXES, "w_min": 1.0})
    return [
        two_ranks.run("tests.parallel.steps", "step", model=qwen3, layout=TWO["dp2"], method=method)[0]
        for method in methods
    ]


@pytest.mark.parametrize("name", ["tp2_sp", "pp2", "cp2"])
def test_a_budget_of_responses_does_not_depend_on_the_layout(two_ranks, qwen3, prefixes, name):
    result = two_ranks.run("tests.parallel.steps", "step", model=qwen3, layout=TWO[name], method=PREFIXES)[0]
    replicas, equal_weights = prefixes
    assert result["metrics"]["mask/high"] > 0 and result["metrics"]["mask/low"] > 0
    assert result["metrics"]["log_ratio/square"] > 0
    assert_same_step(result, replicas)
    with pytest.raises(AssertionError):
        assert_same_step(result, equal_weights)


@pytest.fixture(scope="module")
def first_of_a_step(two_ranks, qwen3):
    """Return the step of two replicas whose ratio is to the log-probabilities of the same pass."""
    return two_ranks.run("tests.parallel.steps", "step", model=qwen3, layout=TWO["dp2"], method=OLD)[0]


@pytest.mark.parametrize("name", ["tp2_sp", "pp2_vpp2", "cp2"])
def test_the_ratio_of_a_first_update_is_one_in_every_layout(two_ranks, qwen3, first_of_a_step, name):
    result = two_ranks.run("tests.parallel.steps", "step", model=qwen3, layout=TWO[name], method=OLD)[0]
    assert result["metrics"]["log_ratio/square"] == 0
    assert_same_step(result, first_of_a_step)


@pytest.mark.parametrize("layout", [TWO["tp2_sp"], TWO["pp2"], TWO["pp2_vpp2"]], ids=["tp2_sp", "pp2", "pp2_vpp2"])
def test_tied_embeddings_make_the_reference_step(two_ranks, qwen3_tied, reference_tied, layout):
    assert_same_step(two_ranks.run("tests.parallel.steps", "step", model=qwen3_tied, layout=layout)[0], reference_tied)


@pytest.mark.parametrize("layout", [TWO["tp2_sp"], TWO["pp2"]], ids=["tp2_sp", "pp2"])
def test_bfloat16_training_stays_near_the_reference(two_ranks, qwen3, reference, layout):
    result = two_ranks.run("tests.parallel.steps", "step", model=qwen3, layout=layout, precision={"train": "bf16"})[0]
    assert 0 < np.abs(result["logp"] - reference["logp"]).max() < 0.1
    assert abs(result["grad_norm"] / reference["grad_norm"] - 1) < 0.05
    for name, grad in reference["grads"].items():
        assert np.linalg.norm(result["grads"][name] - grad) < 0.1 * np.linalg.norm(grad), name


@pytest.mark.parametrize(
    ("layout", "distributed"),
    [(TWO["tp2_sp"], False), (TWO["pp2_vpp2"], False), (TWO["cp2"], False), (TWO["dp2"], True)],
    ids=["tp2_sp", "pp2_vpp2", "cp2", "dp2_distributed"],
)
def test_float16_training_with_a_loss_scale_stays_near_the_reference(two_ranks, qwen3, reference, layout, distributed):
    sections = {"precision": {"train": "fp16"}, "optimizer": {"distributed": distributed}}
    result = two_ranks.run("tests.parallel.steps", "step", model=qwen3, layout=layout, **sections)[0]
    assert 0 < np.abs(result["logp"] - reference["logp"]).max() < 0.01
    assert abs(result["grad_norm"] / reference["grad_norm"] - 1) < 2e-3
    assert result["replicas_differ"] == 0
    for name, grad in reference["grads"].items():
        if not distributed:  # with it, ranks unscale only their own shards
            assert np.linalg.norm(result["grads"][name] - grad) < 0.02 * np.linalg.norm(grad), name
        # Where the gradient is large, Adam's first step depends only on its sign. A few values may have large errors.
        moved = np.linalg.norm(result["weights"][name] - reference["weights"][name])
        assert moved < 2e-3 * np.linalg.norm(reference["weights"][name]), name


def test_the_distributed_optimizer_makes_the_reference_update(two_ranks, qwen3, reference):
    result = two_ranks.run(
        "tests.parallel.steps", "step", model=qwen3, layout=TWO["dp2"], optimizer={"distributed": True}
    )[0]
    assert abs(result["grad_norm"] / reference["grad_norm"] - 1) < 1e-5
    assert worst(result["weights"], reference["weights"]) < (1e-5,)


@pytest.mark.parametrize("layout", [TWO["dp2"], TWO["cp2"]], ids=["dp2", "cp2"])
def test_gradients_that_are_summed_during_backward_are_those_of_the_reference(two_ranks, qwen3, reference, layout):
    assert_same_step(two_ranks.run("tests.parallel.steps", "overlapped_step", model=qwen3, layout=layout)[0], reference)


def test_a_local_denominator_fails_the_same_comparison(two_ranks, qwen3, reference):
    result = two_ranks.run("tests.parallel.steps", "step", model=qwen3, layout=TWO["dp2"], sabotage="local_mean")[0]
    with pytest.raises(AssertionError):
        assert_same_step(result, reference)
    assert worst(result["grads"], reference["grads"])[0] > 0.1
