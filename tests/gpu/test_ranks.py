"""Two ranks over NCCL make the step of plain transformers on a CPU, and load each other's checkpoints."""

import pytest

from tests.gpu.needs import needs_two
from tests.gpu.test_step import assert_near, assert_resumed
from tests.parallel.group import RankGroup
from tests.parallel.test_moe import moe_reference
from tests.parallel.test_parity import TWO, reference_step

pytestmark = needs_two
LAYOUTS = ("tp2_sp", "dp2", "pp2", "cp2", "pp2_vpp2_recompute")
STEPS, CHECKPOINTS = "tests.parallel.steps", "tests.parallel.checkpoint_steps"


@pytest.fixture(scope="module")
def nccl():
    """Two ranks of their own: those of the session may have been started without GPUs."""
    group = RankGroup(2)
    yield group
    group.close()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_makes_the_reference_step(nccl, qwen3, name):
    assert_near(nccl.run(STEPS, "step", model=qwen3, layout=TWO[name])[0], reference_step(qwen3))


def test_gradients_that_are_summed_during_backward_are_those_of_the_reference(nccl, qwen3):
    assert_near(nccl.run(STEPS, "overlapped_step", model=qwen3, layout=TWO["dp2"])[0], reference_step(qwen3))


@pytest.mark.parametrize("layout", [{"expert": 2, "data": 2}, {"expert": 2, "tensor": 2, "sequence": True}], ids=str)
def test_experts_on_two_ranks_make_the_reference_step(nccl, qwen3_moe, layout):
    found = nccl.run("tests.parallel.moe_steps", "step", model=qwen3_moe, layout=layout)[0]
    assert_near(found, moe_reference(qwen3_moe))


def test_a_checkpoint_of_one_layout_is_loaded_by_another(nccl, qwen3, tmp_path):
    common = {"model": qwen3, "folder": tmp_path}
    saved = nccl.run(CHECKPOINTS, "save_and_go_on", layout=TWO["tp2_sp"], **common)[0]
    loaded = nccl.run(CHECKPOINTS, "load_and_go_on", layout=TWO["dp2"], **common)[0]
    loaded["random"] = saved["random"]  # another layout has other random states
    assert_resumed(saved, loaded)
