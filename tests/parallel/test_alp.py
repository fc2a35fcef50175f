"""Perturbed layers make the same training step under every parallel layout and in plain torch."""

import math

import numpy as np
import pytest
import torch
from safetensors import safe_open

from megatron_rl.alp.noise import NoiseRows, noise_key, normals
from tests.parallel import alp_steps, steps
from tests.parallel.alp_steps import ALP, SEED
from tests.parallel.steps import LENGTHS, make_batch
from tests.parallel.test_parity import FOUR, FULL, TWO, assert_same_step, reference_step, worst

SELECTIVE = {"recompute": "selective"}
LAYOUTS = {
    2: {
        **TWO,
        **{f"{name}_recompute": {**TWO[name], **FULL} for name in ("tp2", "tp2_sp", "cp2", "dp2")},
        **{f"{name}_selective": {**TWO[name], **SELECTIVE} for name in ("tp2_sp", "pp2_vpp2", "cp2")},
    },
    4: {
        **{name: FOUR[name] for name in ("tp2_pp2_sp", "tp2_pp2_sp_recompute", "tp2_cp2_sp_recompute", "tp2_dp2")},
        "tp2_dp2_recompute": {**FOUR["tp2_dp2"], **FULL},
    },
}
ONE_RANK: dict = {}
STEPS = "tests.parallel.alp_steps"


def start_of_sigma():
    return torch.nn.Parameter(torch.full((1,), math.log(ALP["sigma_init"])))


class PlainPerturbation:
    """The method on a transformers model: noise is added to the input of every layer, and torch differentiates it."""

    def attach(self, model):
        self.seen, self.noisy_rows = {}, len(model.model.layers) * sum(LENGTHS)
        self.log_sigma = {f"layer {n}": start_of_sigma() for n in range(len(model.model.layers))}
        for n, layer in enumerate(model.model.layers):
            layer.register_forward_pre_hook(
                lambda _, args, kwargs, n=n: self.perturbed(n, args, kwargs), with_kwargs=True
            )
        return self.log_sigma

    def perturbed(self, n, args, kwargs):
        (hidden,) = args
        return (hidden + self.log_sigma[f"layer {n}"].exp() * self.noise(n, hidden, range(hidden.shape[1])),), kwargs

    def noise(self, n, x, noted):
        length = x.shape[1]
        rows = NoiseRows(torch.arange(length), torch.full((length,), self.trajectory))
        eps = normals(rows, noise_key(SEED, 0, n), x.shape[2])
        self.seen.update({(n, self.trajectory, t): eps[t].numpy().tobytes() for t in noted})
        return eps

    def group(self, parameters):
        return {"params": list(parameters.values()), "lr": ALP["lr"], "weight_decay": ALP["weight_decay"]}


class PlainLogits(PlainPerturbation):
    """Noise on all logits, added before they are divided by the temperature."""

    noisy_rows = int(make_batch().mask.sum())

    def attach(self, model):
        self.seen = {}
        self.log_sigma = {"logits": start_of_sigma()}
        self.layers = len(model.model.layers)
        model.lm_head.register_forward_hook(lambda _, args, logits: self.perturbed_logits(logits))
        return self.log_sigma

    def perturbed_logits(self, logits):
        """Add noise. Record it only for tokens whose next token is trained: a policy makes noise only for them."""
        batch, row = make_batch(), self.trajectory - 1000
        mask = batch.mask[batch.cu_seqlens[row] : batch.cu_seqlens[row + 1]]
        return logits + self.log_sigma["logits"].exp() * self.noise(
            self.layers, logits, np.flatnonzero(mask[1:]).tolist()
        )


@pytest.fixture(scope="module")
def plain():
    return PlainPerturbation()


@pytest.fixture(scope="module")
def plain_logits():
    return PlainLogits()


@pytest.fixture(scope="module")
def reference_logits(qwen3, plain_logits):
    return reference_step(qwen3, plain_logits)


@pytest.fixture(scope="module")
def reference(qwen3, plain):
    return reference_step(qwen3, plain)


def assert_same_perturbed_step(result, reference, plain):
    assert result["noise_conflicts"] == 0
    assert result["noise"] == plain.seen
    assert len(plain.seen) == len(set(plain.seen.values())) == plain.noisy_rows
    assert_same_step(result, reference)
    for name in plain.log_sigma:
        moved = result["weights"][name] - math.log(ALP["sigma_init"])
        np.testing.assert_allclose(
            moved, reference["weights"][name] - math.log(ALP["sigma_init"]), rtol=1e-3, atol=1e-6
        )


def test_one_rank_makes_the_reference_step(qwen3, reference, plain):
    assert_same_perturbed_step(alp_steps.step(qwen3, ONE_RANK), reference, plain)


@pytest.mark.parametrize("layout", LAYOUTS[2].values(), ids=LAYOUTS[2])
def test_two_rank_layouts_make_the_reference_step(two_ranks, qwen3, reference, plain, layout):
    assert_same_perturbed_step(two_ranks.run(STEPS, "step", model=qwen3, layout=layout)[0], reference, plain)


@pytest.mark.parametrize("layout", LAYOUTS[4].values(), ids=LAYOUTS[4])
def test_four_rank_layouts_make_the_reference_step(four_ranks, qwen3, reference, plain, layout):
    assert_same_perturbed_step(four_ranks.run(STEPS, "step", model=qwen3, layout=layout)[0], reference, plain)


ON_LOGITS = {"layers": "logits"}


def test_noise_on_the_logits_makes_the_reference_step_on_one_rank(qwen3, reference_logits, plain_logits):
    assert_same_perturbed_step(alp_steps.step(qwen3, ONE_RANK, alp=ON_LOGITS), reference_logits, plain_logits)


@pytest.mark.parametrize("name", ["tp2", "tp2_sp", "cp2", "pp2", "pp2_vpp2", "dp2", "tp2_sp_recompute"])
def test_noise_on_the_logits_makes_the_reference_step_on_two_ranks(
    two_ranks, qwen3, reference_logits, plain_logits, name
):
    result = two_ranks.run(STEPS, "step", model=qwen3, layout=LAYOUTS[2][name], alp=ON_LOGITS)[0]
    assert_same_perturbed_step(result, reference_logits, plain_logits)


@pytest.mark.parametrize("name", ["tp2_pp2_sp", "tp2_cp2_sp_recompute"])
def test_noise_on_the_logits_makes_the_reference_step_on_four_ranks(
    four_ranks, qwen3, reference_logits, plain_logits, name
):
    result = four_ranks.run(STEPS, "step", model=qwen3, layout=FOUR[name], alp=ON_LOGITS)[0]
    assert_same_perturbed_step(result, reference_logits, plain_logits)


@pytest.mark.parametrize("layers", ["all", "logits"])
def test_noise_too_small_to_change_a_number_gives_the_step_without_it_bit_for_bit(qwen3, layers):
    """The gradients of the sigmas vanish with the noise and do not change the norm.

    They add exact zeros to its sum. A processor may then round the same terms in another order.
    """
    clean = steps.step(qwen3, ONE_RANK)
    result = alp_steps.step(qwen3, ONE_RANK, alp={"layers": layers, "sigma_init": 1e-30})
    assert result["loss"] == clean["loss"]
    assert result["grad_norm"] == pytest.approx(clean["grad_norm"], rel=2**-22)
    np.testing.assert_array_equal(result["logp"], clean["logp"])
    for name, grad in clean["grads"].items():
        np.testing.assert_array_equal(result["grads"][name], grad, err_msg=name)
    scales = [grad for name, grad in result["grads"].items() if name not in clean["grads"]]
    assert scales and not any(np.square(grad, dtype=np.float32).any() for grad in scales)
    assert len(result["noise"]) > 0


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


@pytest.mark.parametrize("layers", ["all", "logits"])
def test_the_gradient_of_sigma_is_that_of_central_differences_on_one_rank(qwen3, layers):
    found = alp_steps.gradient_by_differences(qwen3, ONE_RANK, alp={"layers": layers})
    assert len(found) == (4 if layers == "all" else 1)
    assert_gradients_are_differences([found])


@pytest.mark.parametrize("layers", ["all", "logits"])
@pytest.mark.parametrize("layout", [TWO["dp2"], TWO["tp2_sp"]], ids=["dp2", "tp2_sp"])
def test_the_gradient_of_sigma_is_that_of_central_differences(two_ranks, qwen3, layout, layers):
    """Data-parallel ranks compute different micro-batches, so their losses are summed here."""
    ranks = two_ranks.run(STEPS, "gradient_by_differences", model=qwen3, layout=layout, alp={"layers": layers})
    assert_gradients_are_differences(ranks if layout == TWO["dp2"] else ranks[:1])


def assert_gradients_are_differences(ranks):
    for name, (gradient, _) in ranks[0].items():
        differences = sum(part[name][1] for part in ranks)
        assert abs(gradient) > 1e-3
        assert gradient == pytest.approx(differences, rel=1e-3), name


@pytest.mark.parametrize("layers", ["all", "logits"])
def test_only_updates_are_perturbed_and_no_sigma_leaves_the_policy(two_ranks, qwen3, tmp_path, layers):
    layout = TWO["tp2_sp"]
    result = two_ranks.run(
        STEPS, "scores_and_export", model=qwen3, layout=layout, folder=tmp_path / "hf", layers=layers
    )[0]
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
    """With a learning rate near 0 the weights stay the same, so only the noise differs."""
    slow = {"optimizer": {"lr": 1e-12}, "alp": {"lr": 1e-12, "weight_decay": 0.0}}
    result = two_ranks.run(STEPS, "updates", model=qwen3, layout=TWO["pp2"], count=2, **slow)[0]
    assert np.abs(result["logp"][0] - result["logp"][1]).max() > 0.1
    metrics = result["metrics"]
    assert {f"alp/sigma/{n}" for n in range(4)} | {"alp/sigma_min", "alp/sigma_mean", "alp/sigma_max"} <= set(metrics)
    assert metrics["alp/sigma_mean"] == pytest.approx(ALP["sigma_init"])


@pytest.mark.parametrize("distributed", [False, True], ids=["replicated", "sharded_optimizer"])
def test_in_bfloat16_the_sigma_of_the_logits_stays_float32_and_learns(two_ranks, qwen3, reference_logits, distributed):
    result = two_ranks.run(
        STEPS,
        "updates",
        model=qwen3,
        layout=TWO["tp2_sp"],
        precision={"train": "bf16"},
        optimizer={"distributed": distributed},
        alp={"weight_decay": 0.0, **ON_LOGITS},
    )[0]
    assert result["dtypes"] == {(torch.float32, torch.float32)}
    assert result["parameters"] == ["perturbation.log_sigma"] and result["metrics"]["alp/sigma/logits"] > 0
    assert 0 < np.abs(result["logp"][0] - reference_logits["logp"]).max() < 0.3
    assert 0 < abs(result["sigmas"]["logits"].item() - math.log(ALP["sigma_init"])) < 0.1


@pytest.mark.parametrize("distributed", [False, True], ids=["replicated", "sharded_optimizer"])
@pytest.mark.parametrize(("layout", "train"), [(TWO["tp2_sp"], "bf16"), (TWO["dp2"], "bf16"), (TWO["tp2_sp"], "fp16")])
def test_in_sixteen_bits_sigma_stays_float32_and_learns(two_ranks, qwen3, reference, layout, train, distributed):
    result = two_ranks.run(
        STEPS,
        "updates",
        model=qwen3,
        layout=layout,
        precision={"train": train},
        optimizer={"distributed": distributed},
        alp={"weight_decay": 0.0},
    )[0]
    assert result["dtype"] == {"bf16": torch.bfloat16, "fp16": torch.float16}[train]
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
        ({"layout": TWO["pp2_vpp2"], "alp": ON_LOGITS}, {"layout": TWO["tp2_sp"], "alp": ON_LOGITS}),
        *[({"layout": TWO["tp2"], "precision": {"train": train}},) * 2 for train in ("bf16", "fp16")],
    ],
    ids=[
        "tp2_to_pp2",
        "pp2_vpp2_to_dp2",
        "one_layer_pp2_to_tp2_sp",
        "dp2_sharded_optimizer",
        "logits_pp2_vpp2_to_tp2_sp",
        "float32_sigma_beside_bf16",
        "float32_sigma_beside_fp16",
    ],
)
def test_a_checkpoint_carries_sigma_and_its_moments_to_another_layout(two_ranks, qwen3, tmp_path, saving, loading):
    saved = two_ranks.run(STEPS, "save_and_go_on", model=qwen3, folder=tmp_path, **saving)[0]
    other = {**loading, "alp": {**loading.get("alp", {}), "sigma_init": 0.7}}
    loaded = two_ranks.run(STEPS, "load_and_go_on", model=qwen3, folder=tmp_path, **other)[0]
    on_logits = saving.get("alp") == ON_LOGITS
    assert ("logits" if on_logits else "layer 3") in saved["saved"] and saved["saved"].keys() == loaded["saved"].keys()
    for name, value in saved["saved"].items():
        np.testing.assert_array_equal(loaded["saved"][name], value, err_msg=name)
        np.testing.assert_allclose(
            loaded["next"][name], saved["next"][name], atol=1e-5 * np.abs(value).max(), err_msg=name
        )
    moved = [name for name, value in saved["saved"].items() if not np.array_equal(saved["next"][name], value)]
    # A 16-bit weight may be too large to move in one update.
    assert moved if "precision" in saving else len(moved) == len(saved["saved"])
