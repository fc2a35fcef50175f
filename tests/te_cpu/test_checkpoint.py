"""Checkpoints go from Transformer Engine's layers and optimizer to the local ones, and back."""

import pytest

from tests.parallel.test_checkpoint import close, round_trip, same_bits

STEPS = "tests.parallel.checkpoint_steps"
TP2 = {"layout": {"tensor": 2}}
SHARDED = {"layout": {"data": 2}, "optimizer": {"distributed": True}}


@pytest.mark.parametrize("arguments", [TP2, {**SHARDED, "precision": {"train": "bf16"}}], ids=["tp2", "sharded_bf16"])
def test_fused_adam_goes_on_bit_for_bit(te_ranks, qwen3, tmp_path, arguments):
    saved, loaded = round_trip(te_ranks, qwen3, tmp_path, arguments, arguments)
    assert same_bits(loaded["weights"], saved["weights"])
    assert same_bits(loaded["next"]["weights"], saved["next"]["weights"])
    assert not same_bits(loaded["next"]["weights"], loaded["weights"])


@pytest.mark.parametrize("arguments", [TP2, SHARDED], ids=["tp2", "sharded"])
@pytest.mark.parametrize("saving", ["te_ranks", "two_ranks"])
def test_a_run_goes_on_with_the_other_layers(te_ranks, two_ranks, qwen3, tmp_path, saving, arguments):
    groups = {"te_ranks": te_ranks, "two_ranks": two_ranks}
    first = groups.pop(saving)
    (second,) = groups.values()
    saved = first.run(STEPS, "save_and_go_on", model=qwen3, folder=tmp_path, **arguments)[0]
    loaded = second.run(STEPS, "load_and_go_on", model=qwen3, folder=tmp_path, **arguments)[0]
    assert same_bits(loaded["weights"], saved["weights"])
    assert close(loaded["next"]["weights"], saved["next"]["weights"]), "the optimizer's state was not carried over"
