"""Perturbed layers make the same training step under every parallel layout, and the one written out in plain torch."""

import math

import numpy as np
import pytest
import torch

from megatron_rl.perturbation.noise import NoiseRows, noise_key, normals
from tests.parallel.alp_steps import ALP, SEED
from tests.parallel.steps import LENGTHS
from tests.parallel.test_parity import FOUR, FULL, TWO, assert_same_step, reference_step, worst

LAYOUTS = {
    2: {**TWO, "tp2_sp_recompute": {"tensor": 2, "sequence": True, **FULL}, "cp2_recompute": {"context": 2, **FULL}},
    4: {name: FOUR[name] for name in ("tp2_pp2_sp", "tp2_pp2_sp_recompute", "tp2_cp2_sp_recompute", "tp2_dp2")},
}
STEPS = "tests.parallel.alp_steps"


class PlainPerturbation:
    """The method on a transformers model: noise written into the input of every layer, differentiated by torch."""

    def attach(self, model):
        self.seen = {}
        self.log_sigma = {
            f"layer {n}": torch.nn.Parameter(torch.full((1,), math.log(ALP["sigma_init"]))) for n in range(len(model.model.layers))
        }
        for n, layer in enumerate(model.model.layers):
            layer.register_forward_pre_hook(lambda _, args, kwargs, n=n: self.perturbed(n, args, kwargs), with_kwargs=True)
        return self.log_sigma

    def perturbed(self, n, args, kwargs):
        (hidden,) = args
        length = hidden.shape[1]
        rows = NoiseRows(torch.arange(length), torch.full((length,), self.trajectory))
        eps = normals(rows, noise_key(SEED, 0, n), hidden.shape[2])
        self.seen.update({(n, self.trajectory, t): row.tobytes() for t, row in enumerate(eps.numpy())})
        return (hidden + self.log_sigma[f"layer {n}"].exp() * eps,), kwargs

    def group(self, parameters):
        return {"params": list(parameters.values()), "lr": ALP["lr"], "weight_decay": ALP["weight_decay"]}


@pytest.fixture(scope="module")
def plain():
    return PlainPerturbation()


@pytest.fixture(scope="module")
def reference(qwen3, plain):
    return reference_step(qwen3, plain)


def assert_same_perturbed_step(result, reference, plain):
    assert result["noise_conflicts"] == 0
    assert result["noise"] == plain.seen
    assert len(plain.seen) == 4 * sum(LENGTHS)
    assert_same_step(result, reference)
    for name in plain.log_sigma:
        moved = result["weights"][name] - math.log(ALP["sigma_init"])
        np.testing.assert_allclose(moved, reference["weights"][name] - math.log(ALP["sigma_init"]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS[2].values(), ids=LAYOUTS[2])
def test_two_rank_layouts_make_the_reference_step(two_ranks, qwen3, reference, plain, layout):
    assert_same_perturbed_step(two_ranks.run(STEPS, "step", model=qwen3, layout=layout)[0], reference, plain)


@pytest.mark.parametrize("layout", LAYOUTS[4].values(), ids=LAYOUTS[4])
def test_four_rank_layouts_make_the_reference_step(four_ranks, qwen3, reference, plain, layout):
    assert_same_perturbed_step(four_ranks.run(STEPS, "step", model=qwen3, layout=layout)[0], reference, plain)


@pytest.mark.parametrize("layout", [TWO["dp2"], TWO["tp2_sp"]], ids=["dp2", "tp2_sp"])
def test_another_packing_makes_the_reference_step(two_ranks, qwen3, reference, plain, layout):
    result = two_ranks.run(STEPS, "step", model=qwen3, layout=layout, optimizer={"tokens_per_microbatch": 416})[0]
    assert_same_perturbed_step(result, reference, plain)


@pytest.mark.parametrize("layout", [TWO["tp2_sp"], TWO["cp2"]], ids=["tp2_sp", "cp2"])
def test_a_seed_per_rank_fails_the_same_comparison(two_ranks, qwen3, reference, plain, layout):
    result = two_ranks.run(STEPS, "step", model=qwen3, layout=layout, sabotage="seed_of_rank")[0]
    with pytest.raises(AssertionError):
        assert_same_step(result, reference)
    assert worst(result["grads"], reference["grads"])[0] > 0.05
    assert result["noise"] != plain.seen
