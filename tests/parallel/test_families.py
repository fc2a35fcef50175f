"""Every family makes the same training step under each kind of layout, and in plain transformers."""

import numpy as np
import pytest

from megatron_rl.weights.hf_folder import HFFolder
from tests.families import DENSE, FAMILIES_AT_TOY_SIZE, MIXTURES, make_family
from tests.parallel.test_alp import PlainPerturbation, assert_same_perturbed_step
from tests.parallel.test_checkpoint import round_trip as save_and_load
from tests.parallel.test_checkpoint import same_bits
from tests.parallel.test_moe import per_expert
from tests.parallel.test_parity import assert_same_step, reference_step
from tests.parallel.test_weights import check as check_round_trip

LAYOUTS = {
    "tp2_sp": {"tensor": 2, "sequence": True},
    "pp2_recompute": {"pipeline": 2, "recompute": "full"},
    "cp2": {"context": 2},
}
# One of each kind of layer is enough for each layout: what differs between families is in the layer.
DENSE_KINDS = ["qwen2_windows", "llama3", "qwen3_yarn", "glm4"]
MIXTURE_KINDS = ["mixtral", "qwen3_moe_dense_layer", "glm4_moe", "deepseek_v3", "gpt_oss"]
assert set(DENSE_KINDS) < set(DENSE) and set(MIXTURE_KINDS) < set(MIXTURES)


def reference_of(folder, **options):
    """Return the reference step under the names of the folder's tensors."""
    step, files = reference_step(folder, **options), HFFolder(folder)
    stored = files.tensors
    # Buffers have no gradient, and an update leaves them as they are.
    kept = {name: files.read(name).numpy() for name in stored if name.endswith("e_score_correction_bias")}
    mixtral = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", ".mlp.": ".block_sparse_moe."}

    def rename(name):
        if name in stored or not name.startswith("model."):
            return name
        for theirs, released in mixtral.items():
            name = name.replace(theirs, released)
        return name

    def in_files(tensors):
        """Split experts unless the folder has them in one tensor, too."""
        whole = {name: value for name, value in tensors.items() if name in stored}
        rest = per_expert({name: value for name, value in tensors.items() if name not in stored})
        return whole | {rename(name): value for name, value in rest.items()} | kept

    return step | {key: in_files(step[key]) for key in ("grads", "weights")}


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Folders and reference steps, made at the first use."""
    made = {}

    def toy(name):
        if name not in made:
            folder = make_family(tmp_path_factory.mktemp(name), name)
            made[name] = folder, reference_of(folder)
        return made[name]

    return toy


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", [*DENSE_KINDS, *MIXTURE_KINDS])
def test_a_family_makes_the_reference_step(two_ranks, toys, name, layout):
    folder, reference = toys(name)
    if name in MIXTURES and "context" in layout:
        layout = {**layout, "expert": 2}
    result = two_ranks.run("tests.parallel.steps", "step", model=folder, layout=layout)[0]
    assert_same_step(result, reference)


def test_more_ranks_than_key_value_heads_make_the_reference_step(four_ranks, tmp_path):
    folder = make_family(tmp_path, "qwen2", num_key_value_heads=2)
    layout = {"tensor": 4, "sequence": True}
    result = four_ranks.run("tests.parallel.steps", "step", model=folder, layout=layout)[0]
    assert_same_step(result, reference_of(folder))
    check_round_trip(four_ranks, folder, layout)


@pytest.mark.parametrize("name", ["qwen2_windows", "deepseek_v3"])
def test_perturbed_layers_of_a_family_make_the_reference_step(two_ranks, toys, name):
    plain = PlainPerturbation()
    reference = reference_of(toys(name)[0], perturbation=plain)
    layout = LAYOUTS["tp2_sp"]
    result = two_ranks.run("tests.parallel.alp_steps", "step", model=toys(name)[0], layout=layout)[0]
    assert_same_perturbed_step(result, reference, plain)


def test_a_window_that_is_one_key_too_wide_fails_the_same_comparison(two_ranks, toys, tmp_path):
    wider = make_family(tmp_path, "qwen2_windows", sliding_window=17)
    result = two_ranks.run("tests.parallel.steps", "step", model=wider, layout=LAYOUTS["cp2"])[0]
    reference = toys("qwen2_windows")[1]
    with pytest.raises(AssertionError):
        assert_same_step(result, reference)
    assert np.abs(result["logp"] - reference["logp"]).max() > 1e-3


@pytest.mark.parametrize("name", FAMILIES_AT_TOY_SIZE)
def test_two_ranks_give_the_stored_bytes_back(two_ranks, toys, name):
    layout = {"expert": 2, "tensor": 2, "sequence": True} if name in MIXTURES else {"tensor": 2}
    check_round_trip(two_ranks, toys(name)[0], layout)


@pytest.mark.parametrize("name", ["glm4_moe", "gpt_oss"])
def test_a_checkpoint_of_a_family_continues_bit_for_bit(two_ranks, toys, tmp_path, name):
    arguments = {"layout": {"expert": 2, "tensor": 2, "sequence": True}, "precision": {"train": "bf16"}}
    saved, loaded = save_and_load(two_ranks, toys(name)[0], tmp_path, arguments, arguments)
    assert same_bits(loaded["weights"], saved["weights"])
    assert not same_bits(loaded["next"]["weights"], loaded["weights"])
    assert same_bits(loaded["next"]["weights"], saved["next"]["weights"])
