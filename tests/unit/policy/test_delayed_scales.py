"""Delayed scales of a policy are saved and restored together with the weights they belong to."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rl.config import PrecisionConfig
from megatron_rl.errors import PrecisionError
from megatron_rl.objectives import make_objective
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.quantized_products import ProductMonitor
from tests.parallel.refusal_steps import digest
from tests.parallel.steps import OBJECTIVE, make_batch, make_policy
from tests.policies import embedded_plan

BATCH = make_batch().select(np.arange(7))


def policy_of(model: Any, train: str = "bf16") -> Policy:
    return make_policy(model, {}, precision={"train": train, "recipe": "delayed"})


def update(
    policy: Policy, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda loss, logp: loss
) -> Any:
    """Make one update. `change` computes the loss from the objective's loss and the log-probabilities."""
    objective = make_objective(OBJECTIVE)

    def changed(inputs: Any) -> Any:
        out = objective(inputs)
        return replace(out, loss=change(out.loss, inputs.logp[inputs.mask > 0]))

    return policy.update(BATCH, changed, objective.norm)


def scales(policy: Policy) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in policy.products.scale_tensors()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("updates_before", [0, 1])
def test_the_reference_scores_the_same_bit_for_bit_whatever_was_updated_since(qwen3, updates_before):
    policy = policy_of(qwen3)
    for _ in range(updates_before):
        update(policy)
    policy.keep_reference()
    reference, kept = policy.logprobs(BATCH), scales(policy)
    for _ in range(2):
        update(policy)
        now, present = policy.logprobs(BATCH), scales(policy)
        assert len(present) == 4 * 4 * 3 * 2 and not same(present, kept)
        assert np.array_equal(policy.reference_logprobs(BATCH), reference) and not np.array_equal(now, reference)
        assert same(scales(policy), present) and np.array_equal(policy.logprobs(BATCH), now)


def test_copied_weights_score_as_they_did_when_they_are_put_back(qwen3):
    policy = policy_of(qwen3)
    update(policy)
    copied, before = policy.copy_weights(), policy.logprobs(BATCH)
    update(policy)
    newest, after = policy.copy_weights(), policy.logprobs(BATCH)
    policy.put_weights(copied)
    assert np.array_equal(policy.logprobs(BATCH), before)
    policy.put_weights(newest)
    assert np.array_equal(policy.logprobs(BATCH), after) and not np.array_equal(before, after)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda loss, logp: loss * torch.nan, "a non-finite loss: the update is refused"),
        (
            lambda loss, logp: loss + ((logp - logp.detach()) * 1e38).sum() * 1e3,
            r"gradient norm is (inf|nan): .*; lower what",
        ),
    ],
    ids=["loss", "gradient"],
)
def test_a_refused_update_leaves_scores_and_the_next_update_as_they_were(qwen3, change, said):
    policy, undisturbed = policy_of(qwen3), policy_of(qwen3)
    update(policy)
    update(undisturbed)
    before, kept = policy.logprobs(BATCH), scales(policy)
    with pytest.raises(PrecisionError, match=said) as refused:
        update(policy, change)
    assert refused.value.everywhere
    assert same(scales(policy), kept) and np.array_equal(policy.logprobs(BATCH), before)
    update(policy)
    update(undisturbed)
    assert digest(policy) == digest(undisturbed) and same(scales(policy), scales(undisturbed))


def test_an_overflow_in_float16_repeats_the_update_with_the_scales_of_the_first_try(qwen3):
    high, fits = policy_of(qwen3, "fp16"), policy_of(qwen3, "fp16")
    for policy in (high, fits):
        update(policy)
    set_loss_scale(high, 2.0**26)
    stats = update(high)
    assert stats.metrics["optimizer/overflows"] >= 2
    set_loss_scale(fits, stats.metrics["optimizer/loss_scale"])
    plain = update(fits)
    assert plain.metrics["optimizer/overflows"] == 0 and np.array_equal(plain.logp, stats.logp)
    assert digest(high) == digest(fits) and same(scales(high), scales(fits))


def set_loss_scale(policy: Policy, scale: float) -> None:
    scaler = policy.optimizer.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": torch.tensor([scale])})


def test_scales_that_transformer_engine_keeps_to_itself_are_refused_where_earlier_weights_are_to_score(qwen3):
    policy = policy_of(qwen3)
    plan = embedded_plan(PrecisionConfig(recipe="delayed", train="bf16"), policy.shape.num_layers)
    policy.products = ProductMonitor(plan, [], policy.mesh, transformer_engine=True)
    with pytest.raises(PrecisionError, match=r"scored with present scales; set precision.recipe: tensorwise"):
        policy.keep_reference()
