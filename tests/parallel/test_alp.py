"""Perturbed layers make the same training step under every parallel layout, and the one written out in plain torch."""

import math

import numpy as np
import pytest
import torch
from safetensors import safe_open

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
            f"layer {n}": torch.nn.Parameter(torch.full((1,), math.log(ALP["sigma_init"])))
            for n in range(len(model.model.layers))
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


@pytest.mark.parametrize("layout", [TWO["dp2"], TWO["tp2_sp"]], ids=["dp2", "tp2_sp"])
def test_the_gradient_of_sigma_is_that_of_central_differences(two_ranks, qwen3, layout):
    """Data parallelism stands for one rank: each computes whole micro-batches; their losses are added up here."""
    ranks = two_ranks.run(STEPS, "gradient_by_differences", model=qwen3, layout=layout)
    parts = ranks if layout == TWO["dp2"] else ranks[:1]
    for name, (gradient, _) in ranks[0].items():
        differences = sum(part[name][1] for part in parts)
        assert abs(gradient) > 1e-3
        assert gradient == pytest.approx(differences, rel=1e-3), name


def test_only_updates_are_perturbed_and_no_sigma_leaves_the_policy(two_ranks, qwen3, tmp_path):
    layout = TWO["tp2_sp"]
    result = two_ranks.run(STEPS, "scores_and_export", model=qwen3, layout=layout, folder=tmp_path / "hf")[0]
    plain = two_ranks.run("tests.parallel.steps", "step", model=qwen3, layout=layout)[0]
    np.testing.assert_array_equal(result["logp"], plain["logp"])
    np.testing.assert_array_equal(result["logref"], plain["logp"])
    assert np.abs(result["perturbed"] - plain["logp"]).max() > 1
    with safe_open(tmp_path / "hf" / "model.safetensors", "numpy") as file:
        assert sorted(file.keys()) == sorted(result["names"]) == sorted(plain["weights"])


@pytest.mark.parametrize("layout", [TWO["pp2"], TWO["tp2_sp"]], ids=["pp2", "tp2_sp"])
def test_a_range_of_layers_is_perturbed_and_a_fixed_sigma_stays(two_ranks, qwen3, reference, layout):
    some = two_ranks.run(STEPS, "updates", model=qwen3, layout=layout, alp={"layers": [1, 3]})[0]
    assert sorted(some["sigmas"]) == ["layer 1", "layer 2"]
    fixed = two_ranks.run(STEPS, "updates", model=qwen3, layout=layout, alp={"learnable": False})[0]
    assert not fixed["parameters"] and fixed["kept"]
    assert {value.item() for value in fixed["sigmas"].values()} == {np.float32(math.log(ALP["sigma_init"]))}
    np.testing.assert_allclose(fixed["logp"][0], reference["logp"], atol=1e-5)
    assert np.abs(some["logp"][0] - reference["logp"]).max() > 0.1


def test_every_update_draws_anew_and_names_its_sigmas(two_ranks, qwen3):
    """With a learning rate of next to nothing the weights stand still, so that the noise alone differs."""
    slow = {"optimizer": {"lr": 1e-12}, "alp": {"lr": 1e-12, "weight_decay": 0.0}}
    result = two_ranks.run(STEPS, "updates", model=qwen3, layout=TWO["pp2"], count=2, **slow)[0]
    assert np.abs(result["logp"][0] - result["logp"][1]).max() > 0.1
    metrics = result["metrics"]
    assert {f"alp/sigma/{n}" for n in range(4)} | {"alp/sigma_min", "alp/sigma_mean", "alp/sigma_max"} <= set(metrics)
    assert metrics["alp/sigma_mean"] == pytest.approx(ALP["sigma_init"])


@pytest.mark.parametrize("distributed", [False, True], ids=["replicated", "sharded_optimizer"])
@pytest.mark.parametrize("layout", [TWO["tp2_sp"], TWO["dp2"]], ids=["tp2_sp", "dp2"])
def test_in_bfloat16_sigma_stays_float32_and_learns(two_ranks, qwen3, reference, layout, distributed):
    result = two_ranks.run(
        STEPS,
        "updates",
        model=qwen3,
        layout=layout,
        precision={"train": "bf16"},
        optimizer={"distributed": distributed},
        alp={"weight_decay": 0.0},
    )[0]
    assert result["dtype"] == torch.bfloat16
    assert result["dtypes"] == {(torch.float32, torch.float32)}
    assert 0 < np.abs(result["logp"][0] - reference["logp"]).max() < 0.3
    for value in result["sigmas"].values():
        assert 0 < abs(value.item() - math.log(ALP["sigma_init"])) < 0.1


@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        ({"layout": TWO["tp2"]}, {"layout": TWO["pp2"]}),
        ({"layout": TWO["pp2_vpp2"]}, {"layout": TWO["dp2"]}),
        ({"layout": TWO["pp2"], "alp": {"layers": [3, 4]}}, {"layout": TWO["tp2_sp"], "alp": {"layers": [3, 4]}}),
        (
            {"layout": TWO["dp2"], "optimizer": {"distributed": True}},
            {"layout": TWO["dp2"], "optimizer": {"distributed": True}},
        ),
    ],
    ids=["tp2_to_pp2", "pp2_vpp2_to_dp2", "one_layer_pp2_to_tp2_sp", "dp2_sharded_optimizer"],
)
def test_a_checkpoint_carries_sigma_and_its_moments_to_another_layout(two_ranks, qwen3, tmp_path, saving, loading):
    saved = two_ranks.run(STEPS, "save_and_go_on", model=qwen3, folder=tmp_path, **saving)[0]
    other = {**loading, "alp": {**loading.get("alp", {}), "sigma_init": 0.7}}
    loaded = two_ranks.run(STEPS, "load_and_go_on", model=qwen3, folder=tmp_path, **other)[0]
    assert "layer 3" in saved["saved"] and saved["saved"].keys() == loaded["saved"].keys()
    for name, value in saved["saved"].items():
        np.testing.assert_array_equal(loaded["saved"][name], value, err_msg=name)
        np.testing.assert_allclose(loaded["next"][name], saved["next"][name], atol=1e-5 * np.abs(value).max(), err_msg=name)
        assert not np.array_equal(saved["next"][name], value)
