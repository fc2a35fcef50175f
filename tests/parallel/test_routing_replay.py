"""With replay, the trainer routes every token to the given experts under every layout and learns through its scores."""

import numpy as np
import pytest
import torch

from megatron_rl.errors import UserError
from tests.parallel import moe_steps
from tests.parallel.alp_steps import ALP
from tests.parallel.moe_steps import replay_batch
from tests.parallel.steps import make_batch, make_policy
from tests.parallel.test_alp import PlainPerturbation
from tests.parallel.test_moe import FOUR, TWO, moe_reference
from tests.parallel.test_parity import assert_same_step, worst

STEPS = "tests.parallel.moe_steps"
LAYOUTS = {**{f"2_{k}": v for k, v in TWO.items()}, **{f"4_{k}": v for k, v in FOUR.items()}}


class PlainReplay:
    """The method on a transformers model: gates of given experts from the router's logits, differentiated by torch."""

    def __init__(self, batch, noise=None):
        self.batch, self.noise = batch, noise

    @property
    def trajectory(self):
        return self._trajectory

    @trajectory.setter
    def trajectory(self, number):
        self._trajectory = number
        if self.noise is not None:
            self.noise.trajectory = number

    def attach(self, model):
        for n, layer in enumerate(model.model.layers):
            layer.mlp.gate.register_forward_hook(lambda gate, args, out, n=n: self.replayed(gate, n, *out))
        return {} if self.noise is None else self.noise.attach(model)

    def replayed(self, gate, n, logits, scores, free):
        row = self.trajectory - 1000
        given = torch.from_numpy(
            self.batch.routing[self.batch.cu_seqlens[row] : self.batch.cu_seqlens[row + 1], n]
        ).long()
        chosen = torch.where(given >= 0, given, free)
        exponentials = logits.exp()
        chosen_ones = exponentials.gather(-1, chosen)
        gates = chosen_ones / (chosen_ones if gate.norm_topk_prob else exponentials).sum(-1, keepdim=True)
        return logits, gates, chosen

    def group(self, parameters):
        return self.noise.group(parameters)


@pytest.fixture(scope="module")
def reference(qwen3_moe):
    return moe_reference(qwen3_moe, perturbation=PlainReplay(replay_batch()))


def replay_step(request, name, model, **options):
    group = request.getfixturevalue("two_ranks" if name.startswith("2_") else "four_ranks")
    return group.run(STEPS, "replay_step", model=model, layout=LAYOUTS[name], **options)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_makes_the_reference_step(request, qwen3_moe, reference, name):
    result = replay_step(request, name, qwen3_moe)
    assert_same_step(result, reference)
    np.testing.assert_allclose(result["scored"], reference["logp"], atol=1e-5)
    given = replay_batch().routing[..., 0] >= 0
    assert result["metrics"]["routing/replayed"] == given.mean()
    assert 0 < result["metrics"]["routing/agreement"] < 0.2, "experts drawn at random are seldom those of the router"


def test_gates_that_are_not_normalized_make_the_reference_step(qwen3_moe_unnormalized, monkeypatch):
    batch = replay_batch(experts=4, per_token=3)
    plain = moe_reference(qwen3_moe_unnormalized, perturbation=PlainReplay(batch))
    monkeypatch.setattr(moe_steps, "replay_batch", lambda: batch)
    assert_same_step(moe_steps.replay_step(qwen3_moe_unnormalized, {}), plain)


@pytest.mark.parametrize("name", ["2_ep2_dp2", "2_pp2_vpp2_recompute", "4_ep2_tp2_pp2_recompute"])
def test_perturbed_layers_make_the_reference_step(request, qwen3_moe, name):
    plain = moe_reference(qwen3_moe, perturbation=PlainReplay(replay_batch(), PlainPerturbation()))
    assert_same_step(replay_step(request, name, qwen3_moe, alp=ALP), plain)


@pytest.mark.parametrize("name", ["2_ep2_dp2", "2_pp2_vpp2_recompute"])
def test_rows_of_neighboring_tokens_fail_the_same_comparison(request, qwen3_moe, reference, name):
    result = replay_step(request, name, qwen3_moe, sabotage="shifted")
    with pytest.raises(AssertionError):
        assert_same_step(result, reference)
    assert worst(result["grads"], reference["grads"])[0] > 0.1


def perturb_routers(policy):
    with torch.no_grad():
        for layer in policy.models[0].decoder.layers:
            layer.mlp.router.weight += 0.05 * torch.randn(
                layer.mlp.router.weight.shape, generator=torch.Generator().manual_seed(5)
            )


def test_replay_keeps_the_choice_of_experts_when_routers_have_moved_and_a_free_choice_does_not(qwen3_moe):
    """The choice of the unchanged routers represents the engine's choice."""
    policy = make_policy(qwen3_moe, {})
    engine = moe_steps.chosen_experts(policy, make_batch())
    assert (np.diff(engine, axis=-1) > 0).all() and engine.min() == 0 and engine.max() == 7
    perturb_routers(policy)
    free = moe_steps.chosen_experts(policy, make_batch())
    routing = engine.astype(np.int32)
    routing[make_batch().cu_seqlens[1:] - 1] = -1
    replayed = moe_steps.chosen_experts(policy, make_batch().with_columns(routing=routing))
    given = routing[:, 0, 0] >= 0
    assert np.array_equal(replayed[given], engine[given])
    assert 0.02 < (free[given] != engine[given]).any(-1).mean() < 0.9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda routing: None, "carry no routed experts"),
        (lambda routing: routing[:, :3], r"has shape \[859, 3, 2\], \[859, 4, 2\] is needed"),
        (lambda routing: routing + 1, r"outside \[0, 8\)"),
    ],
    ids=["missing", "layers", "range"],
)
def test_a_choice_that_cannot_be_replayed_is_refused(qwen3_moe, change, words):
    policy = make_policy(qwen3_moe, {}, rollout={"routing_replay": True})
    with pytest.raises(UserError, match=words):
        policy.logprobs(make_batch().with_columns(routing=change(replay_batch().routing)))


def test_a_dense_model_replays_nothing(qwen3):
    policy = make_policy(qwen3, {})
    with pytest.raises(UserError, match="the model has none"):
        policy.logprobs(replay_batch())
