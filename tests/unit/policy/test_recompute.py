"""`parallel.recompute` decides what a forward pass keeps for backward, and changes no number."""

import numpy as np
import pytest
import torch

from megatron_rl.objectives import make_objective
from tests.parallel.steps import OBJECTIVE, exported, make_batch, make_policy

ALP = {"enabled": True, "sigma_init": 0.3}


class Kept:
    """Number of bytes that autograd keeps during forward passes: inside core attention, and in total."""

    def __init__(self, model):
        self.forward, self.inside, self.attention, self.all = False, False, 0, 0
        model.register_forward_pre_hook(lambda *_: self._set("forward", True))
        model.register_forward_hook(lambda *_: self._set("forward", False))
        for layer in model.decoder.layers:
            core = layer.self_attention.core_attention
            core.register_forward_pre_hook(lambda *_: self._set("inside", True))
            core.register_forward_hook(lambda *_: self._set("inside", False))

    def _set(self, name, value):
        setattr(self, name, value)

    def note(self, tensor):
        if self.forward:
            self.all += tensor.nbytes
            self.attention += tensor.nbytes * self.inside
        return tensor


def update(folder, recompute):
    """Return the bytes kept, the loss and the gradients of one perturbed update on one rank."""
    policy = make_policy(folder, {"recompute": recompute}, alp=ALP)
    kept, objective, grads = Kept(policy.models[0]), make_objective(OBJECTIVE), {}
    policy.optimizer.step = lambda _: grads.update(exported(policy, lambda p: p.main_grad))
    with torch.autograd.graph.saved_tensors_hooks(kept.note, lambda tensor: tensor):
        loss = policy.update(make_batch(), objective, objective.norm).loss
    grads |= {
        name: p.main_grad.numpy().copy() for name, p in policy.models[0].named_parameters() if "log_sigma" in name
    }
    return kept, loss, grads


@pytest.fixture(scope="module")
def results(qwen3):
    return {recompute: update(qwen3, recompute) for recompute in ("none", "selective", "full")}


def test_selective_recompute_keeps_nothing_of_core_attention_and_the_rest_as_it_is(results):
    nothing, selective, full = (results[name][0] for name in ("none", "selective", "full"))
    assert nothing.attention > 0.1 * nothing.all
    assert selective.attention == 0
    assert full.all < 0.25 * nothing.all, "layers keep their inputs alone"
    between = nothing.all - nothing.attention
    assert between <= selective.all < nothing.all, "besides the inputs of attention"


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_no_number_of_a_perturbed_update(results, recompute):
    (_, loss, grads), (_, expected_loss, expected) = results[recompute], results["none"]
    assert loss == expected_loss and grads.keys() == expected.keys()
    assert sum("log_sigma" in name for name in grads) == 4
    for name, grad in expected.items():
        np.testing.assert_array_equal(grads[name], grad, err_msg=name)
