"""A column takes one declaration: its values go from an engine's answer to the loss, in every layout."""

import pytest

LAYOUTS = {"tp2": {"tensor": 2}, "cp2": {"context": 2}, "dp2": {"data": 2}, "pp2": {"pipeline": 2}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_declared_column_reaches_the_loss_after_a_restart(two_ranks, qwen3, tmp_path, layout):
    found = run(two_ranks, qwen3, tmp_path, layout)
    assert found["wrong"] == 0 and found["seen"] == found["trained"] > 60


def test_values_of_a_neighboring_token_fail_the_same_comparison(two_ranks, qwen3, tmp_path):
    assert run(two_ranks, qwen3, tmp_path, "tp2", shift=1)["wrong"] > 60


def run(ranks, model, folder, layout, **more):
    """Return rank 0's metrics of one update with the column."""
    keys = {"model": model, "layout": LAYOUTS[layout], "folder": folder, **more}
    return ranks.run("tests.parallel.column_steps", "update", **keys)[0]
