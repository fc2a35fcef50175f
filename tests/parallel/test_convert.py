"""Checkpoints of megatron-core's own writer convert to the bytes of the Hugging Face folder, and the reverse."""

import pytest

from megatron_rl.convert.convert import Options, to_hf, to_megatron
from megatron_rl.convert.inspect import inspect_checkpoint
from megatron_rl.convert.verbs import reshard_command
from megatron_rl.convert.verify import verify_pair
from megatron_rl.errors import CheckpointError, UserError
from megatron_rl.weights.digest import tensor_digest
from megatron_rl.weights.hf_folder import HFFolder
from tests.families import make_family

SMALL = Options(shard_bytes=200_000)
CASES = {
    "qwen2": {"tensor": 2, "sequence": True},
    "mixtral": {"expert": 2, "tensor": 2, "sequence": True},
    "qwen3_moe_dense_layer": {"expert": 2, "data": 2},
    "gpt_oss": {"expert": 2, "data": 2},
    "deepseek_v3": {"expert": 2, "tensor": 2, "sequence": True},
}


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_two_ranks_becomes_the_folder_and_the_folder_a_checkpoint_of_any_layout(
    two_ranks, name, tmp_path
):
    model, layout = make_family(tmp_path / "model", name), CASES[name]
    written = tmp_path / "megatron"
    two_ranks.run("tests.parallel.convert_steps", "save_as_megatron", model=model, layout=layout, out=written)
    assert inspect_checkpoint(written).iteration == "7"
    to_hf(written, tmp_path / "hf", model, SMALL)
    assert verify_pair(tmp_path / "hf", model, None, 1).same
    to_megatron(model, tmp_path / "ours", SMALL)
    assert verify_pair(tmp_path / "ours", written, model, 1).same
    digests = two_ranks.run(
        "tests.parallel.convert_steps",
        "load_megatron",
        model=model,
        layout=layout,
        checkpoint=tmp_path / "ours" / "release",
    )[0]
    stored = HFFolder(model)
    assert digests == {name: tensor_digest(stored.read(name)) for name in stored.tensors}


def test_a_training_checkpoint_becomes_a_folder(two_ranks, tmp_path):
    model = make_family(tmp_path / "model", "qwen3_moe_dense_layer")
    layout = {"expert": 2, "tensor": 2, "sequence": True}
    folder = tmp_path / "checkpoints"
    two_ranks.run("tests.parallel.convert_steps", "save_training", model=model, layout=layout, folder=folder)
    (step,) = folder.glob("step_*")
    report = inspect_checkpoint(step)
    assert report.optimizer and report.nbytes > 2 * report.parameters * 4
    to_hf(step, tmp_path / "hf", model, SMALL)
    assert verify_pair(tmp_path / "hf", model, None, 1).same
    shard = next(step.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"is not usable: {shard.name} is damaged: its content has changed"):
        to_hf(step, tmp_path / "damaged", model, SMALL)
    assert not (tmp_path / "damaged").exists()


def test_an_optimizer_state_of_megatron_core_that_a_layout_binds_is_refused_by_name(two_ranks, tmp_path, capsys):
    model, layout = make_family(tmp_path / "model", "qwen2"), {"tensor": 2, "sequence": True}
    kinds = {"fully_reshardable": "by parameter", "dp_reshardable": "dp_reshardable"}
    for sharding, found in kinds.items():
        folder = tmp_path / sharding
        arguments = {"model": model, "layout": layout, "folder": folder, "sharding": sharding}
        two_ranks.run("tests.parallel.convert_steps", "save_with_optimizer", **arguments)
        assert inspect_checkpoint(folder).optimizer == found
        to_hf(folder, tmp_path / f"{sharding}_hf", model, SMALL)
        assert verify_pair(tmp_path / f"{sharding}_hf", model, None, 1).same
    reshard_command(tmp_path / "fully_reshardable")
    assert "load under any layout, nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"state \(dp_reshardable\) does not: .*--dist-ckpt-optim-fully-reshardable"):
        reshard_command(tmp_path / "dp_reshardable")
