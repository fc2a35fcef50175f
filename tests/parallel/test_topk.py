"""Top-k tokens, rewards and a reference policy give the same results under every layout."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import make_qwen3
from tests.parallel.steps import OPTIMIZER
from tests.parallel.topk_steps import shift, topk_batch

TEMPERATURE = 0.7
LAYOUTS = {
    "tp2": {"tensor": 2},
    "tp2_sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"context": 2},
    "dp2": {"data": 2},
}


@pytest.fixture(scope="module")
def expected(qwen3):
    """Return the same update through transformers: one sequence at a time, log_softmax over the whole vocabulary."""
    model = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32)
    batch = topk_batch()
    tokens_trained, loss, moved_sum = float(batch.mask.sum()), torch.zeros(()), 0.0
    for i, (a, b) in enumerate(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)):
        tokens = torch.from_numpy(batch.tokens[a:b].astype(np.int64))
        ids, logmu = torch.from_numpy(batch.topk_ids[a:b].astype(np.int64)), torch.from_numpy(batch.topk_logmu[a:b])
        mask, advantages = torch.from_numpy(batch.mask[a:b])[1:], torch.from_numpy(batch.token_advantages[a:b])[1:]
        scores = torch.log_softmax(model(tokens[None]).logits[0, :-1] / TEMPERATURE, -1)
        logp = scores.gather(-1, tokens[1:, None])[:, 0]
        moved = shift(scores.gather(-1, ids[1:]), logmu[1:]).detach()
        loss = loss - (advantages * logp * (1 + float(batch.rewards[i]) ** 2) * moved * mask).sum() / tokens_trained
        moved_sum += float((moved * mask).sum())
    loss.backward()
    norm = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in model.parameters())).item()
    for p in model.parameters():
        p.grad.mul_(min(1.0, OPTIMIZER["grad_clip"] / (norm + 1e-6)))
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    torch.optim.AdamW(
        [{"params": matrices, "weight_decay": OPTIMIZER["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
        lr=OPTIMIZER["lr"],
        eps=OPTIMIZER["eps"],
    ).step()
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    return {"loss": loss.item(), "grad_norm": norm, "shift": moved_sum / tokens_trained, "weights": weights}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_an_update_that_reads_the_likeliest_tokens_is_that_of_plain_transformers(two_ranks, qwen3, expected, layout):
    result = two_ranks.run("tests.parallel.topk_steps", "step", model=qwen3, layout=layout)[0]
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)
    assert result["metrics"]["shift"] == pytest.approx(expected["shift"], rel=1e-5)
    assert result["metrics"]["attached"] == 0.0
    assert result["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert set(result["weights"]) == set(expected["weights"])
    for name, weight in expected["weights"].items():
        np.testing.assert_allclose(result["weights"][name], weight, atol=1e-5 * np.abs(weight).max(), err_msg=name)


@pytest.fixture(scope="module")
def centered(qwen3):
    """Return loss and gradient norm of an update through transformers, with score centering and without."""
    model = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32)
    batch, found = topk_batch(), []
    for centers in (True, False):
        model.zero_grad()
        loss = torch.zeros(())
        for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            tokens = torch.from_numpy(batch.tokens[a:b].astype(np.int64))
            ids = torch.from_numpy(batch.topk_ids[a:b].astype(np.int64))[1:]
            q = torch.from_numpy(batch.topk_logmu[a:b])[1:].exp()
            mask, advantages = torch.from_numpy(batch.mask[a:b])[1:], torch.from_numpy(batch.token_advantages[a:b])[1:]
            scores = torch.log_softmax(model(tokens[None]).logits[0, :-1] / TEMPERATURE, -1)
            head, p = scores.gather(-1, ids), scores.gather(-1, ids).exp().detach()
            rho = (1 - q.sum(-1)) / (1 - p.sum(-1))
            alpha = torch.minimum(torch.maximum(torch.ones_like(rho), 0.5 * rho), 1.5 * rho)
            mass = torch.minimum(torch.maximum(p, 0.5 * q), 1.5 * q)
            drift = ((mass - alpha[:, None] * p) * head).sum(-1) if centers else 0.0
            loss = loss + (advantages * mask * (drift - scores.gather(-1, tokens[1:, None])[:, 0])).nan_to_num().sum()
        (loss / float(batch.mask.sum())).backward()
        norm = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in model.parameters())).item()
        found.append((loss.item() / float(batch.mask.sum()), norm))
    return found


CENTERED = [LAYOUTS[name] for name in ("tp2_sp", "pp2_vpp2", "cp2", "dp2")]


@pytest.mark.parametrize("layout", CENTERED, ids=str)
def test_a_centered_update_is_that_of_plain_transformers_under_every_layout(two_ranks, qwen3, centered, layout):
    result = two_ranks.run("tests.parallel.topk_steps", "centered_step", model=qwen3, layout=layout)[0]
    (loss, norm), (_, without) = centered
    assert result["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert result["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert abs(without - norm) > 1e-4 * norm, "the gradient through the top tokens must be seen"
    assert 0 < result["metrics"]["centering/tail"] < 1 and result["metrics"]["centering/size"] > 0


DISTRIBUTED = {"optimizer": {"distributed": True}}
REFERENCE = {
    "tp2": (LAYOUTS["tp2"], {}),
    "pp2": (LAYOUTS["pp2"], {}),
    "dp2_distributed": (LAYOUTS["dp2"], DISTRIBUTED),
    "tp2_bf16_distributed": (LAYOUTS["tp2"], {**DISTRIBUTED, "precision": {"train": "bf16"}}),
}


@pytest.mark.parametrize(("layout", "sections"), REFERENCE.values(), ids=REFERENCE)
def test_the_reference_is_the_policy_as_it_was_kept_and_asking_it_leaves_no_trace(
    two_ranks, qwen3_tied, layout, sections
):
    results = two_ranks.run("tests.parallel.topk_steps", "reference", model=qwen3_tied, layout=layout, **sections)
    for found in results[0]["found"]:
        np.testing.assert_array_equal(found, results[0]["before"])
    assert np.abs(results[0]["after"] - results[0]["before"]).max() > 1e-3, "training must have moved the policy"
    for result in results:
        assert "keep_reference" in result["unkept"]
        assert "tokens_per_microbatch" in result["refused"]
        assert result["same_bits"] == [True, True]
        assert result["same_places"], "parameters must stay where the optimizer has them"
        assert result["same_training"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Return a folder of other weights, and its log-probabilities of the batch through transformers."""
    folder = make_qwen3(tmp_path_factory.mktemp("teacher"), tied=False, seed=1)
    model, batch = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), topk_batch()
    logref = np.zeros(len(batch.tokens), dtype=np.float32)
    with torch.no_grad():
        for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            tokens = torch.from_numpy(batch.tokens[a:b].astype(np.int64))
            scores = torch.log_softmax(model(tokens[None]).logits[0, :-1] / TEMPERATURE, -1)
            logref[a + 1 : b] = scores.gather(-1, tokens[1:, None])[:, 0].numpy()
    return folder, logref * batch.mask


TAUGHT = {name: REFERENCE[name] for name in ("tp2", "pp2", "tp2_bf16_distributed")}


@pytest.mark.parametrize(("layout", "sections"), TAUGHT.values(), ids=TAUGHT)
def test_a_teacher_from_another_folder_is_that_of_transformers_and_the_student_stays_what_it_was(
    two_ranks, qwen3, teacher, layout, sections
):
    folder, logref = teacher
    near = 0.3 if "precision" in sections else 1e-4  # nats; bf16 rounds the teacher's weights and sums
    arguments = {"model": qwen3, "teacher": folder, "layout": layout, **sections}
    results = two_ranks.run("tests.parallel.topk_steps", "taught", **arguments)
    for result in results:
        assert result["untouched"]
        assert result["itself"] < 1e-4 * result["grad_norm"], "a student that is its teacher learns nothing"
    batch, found = topk_batch(), results[0]
    np.testing.assert_allclose(found["logref"], logref, atol=near, rtol=0)
    assert np.abs(found["logref"] - found["own"]).max() > 1, "the teacher must be another"
    keep = batch.mask > 0
    distance = (found["own"] - found["logref"])[keep]
    loss = np.mean(np.exp((found["own"] - batch.logmu)[keep]) * distance)
    assert found["loss"] == pytest.approx(loss, rel=1e-4)
    assert found["metrics"]["opd/distance"] == pytest.approx(distance.mean(), rel=1e-4)
