import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_rl.errors import UserError
from megatron_rl.study.verdict import make_verdict
from tests.unit.study.simulated import TrueArm, simulate_study

EQUAL, WORSE, COLLAPSING = TrueArm(), TrueArm(top=0.4, k3=2e-2), TrueArm(collapse_at=40, k3=5e-2)


def sentence(verdict: dict[str, Any], arm: str, about: str = "reward") -> dict[str, str]:
    (found,) = (one for one in verdict["sentences"] if one["arm"] == arm and one["about"] == about)
    return found


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arms = {"bf16": EQUAL, "fp8": EQUAL, "nvfp4": WORSE, "nvfp4+grpo": COLLAPSING}
    folder = tmp_path_factory.mktemp("study")
    return simulate_study(folder, arms, prompts=200, tried=8, absent={"nvfp4-s4": "missing"})


@pytest.fixture(scope="module")
def verdict(study: Path) -> dict[str, Any]:
    return make_verdict(study)


def test_an_equal_arm_is_called_equivalent_with_its_interval_and_seeds(verdict: dict[str, Any]) -> None:
    found = sentence(verdict, "fp8")
    assert found["result"] == "equivalent"
    interval = verdict["arms"][1]["comparison"]["tost"]["interval"]
    low, high = 100 * interval["low"], 100 * interval["high"]
    text = f"fp8: equivalent to bf16 within 5 points (90 % interval {low:.1f} .. {high:.1f}, 5 seeds)"
    assert found["text"] == text
    assert -5 < low < high < 5


def test_a_worse_arm_is_called_lower_and_its_missing_cell_is_named(verdict: dict[str, Any]) -> None:
    found = sentence(verdict, "nvfp4")
    assert found["result"] == "lower"
    assert "4 seeds" in found["text"]
    assert found["beside"] == "12 configurations tried; missing: nvfp4-s4"
    difference = verdict["arms"][2]["comparison"]["difference"]
    assert difference["low"] < -0.2 < difference["high"], "the true difference is 20 points at the last step, nearly"


def test_a_planted_collapse_is_found_and_nothing_else_is_called_one(verdict: dict[str, Any]) -> None:
    found = sentence(verdict, "nvfp4+grpo", "collapse")
    assert found["text"].startswith("nvfp4+grpo: 5 of 5 runs collapsed at step 40 (48 % .. 100 % of runs, exact 95 %")
    assert "a different share than bf16" in found["text"]
    assert sentence(verdict, "fp8", "collapse")["text"] == (
        "fp8: no collapse in 5 runs (at most 45 % of runs, one-sided 95 % bound, 5 seeds)"
    )


def test_the_numbers_are_those_of_the_simulation(verdict: dict[str, Any]) -> None:
    arms = {arm["arm"]: arm for arm in verdict["arms"]}
    assert arms["nvfp4"]["mismatch_ratio"]["value"] == pytest.approx(20, rel=0.03)
    assert arms["bf16"]["stability"]["growth"]["low"] < 0.3 < arms["bf16"]["stability"]["growth"]["high"]
    ratio = arms["fp8"]["speed_up"]["steps"][1]["ratio"]
    assert ratio["low"] < 1 < ratio["high"]
    assert sum(verdict["variance"][""].values()) == pytest.approx(1)
    assert verdict["scale"]["fp8"] == {"refused": "0 sizes: a power law needs 4"}


def test_the_same_tables_give_the_same_file_which_is_strict_json(study: Path, verdict: dict[str, Any]) -> None:
    text = (study / "report" / "verdict.json").read_text()
    assert make_verdict(study) == verdict == json.loads(text, parse_constant=pytest.fail)


def test_no_claim_stands_without_interval_and_seeds(verdict: dict[str, Any]) -> None:
    for one in verdict["sentences"]:
        assert "seed" in one["text"], one
        assert " .. " in one["text"] or "bound" in one["text"], one
        assert "12 configurations tried" in one["beside"]


def test_one_seed_says_one_seed_and_claims_nothing(tmp_path: Path) -> None:
    verdict = make_verdict(simulate_study(tmp_path, {"bf16": EQUAL, "nvfp4": WORSE}, seeds=1))
    found = sentence(verdict, "nvfp4")
    assert found["result"] == "not shown"
    assert found["text"].startswith("nvfp4: not shown: one seed (95 % interval -")
    assert "one seed" in sentence(verdict, "nvfp4", "collapse")["text"]
    assert verdict["arms"][1]["comparison"]["tost"] is None


def test_two_seeds_claim_nothing(tmp_path: Path) -> None:
    verdict = make_verdict(simulate_study(tmp_path, {"bf16": EQUAL, "nvfp4": WORSE}, seeds=2))
    assert sentence(verdict, "nvfp4")["result"] == "not shown"
    assert "3 are the least for a claim" in sentence(verdict, "nvfp4")["text"]


def test_an_arm_with_a_failed_cell_is_not_called_equivalent(tmp_path: Path) -> None:
    """Runs that fail are the worst ones. Without them an arm looks better than it is."""
    arms = {"bf16": EQUAL, "fp8": EQUAL}
    verdict = make_verdict(simulate_study(tmp_path, arms, seeds=6, prompts=300, absent={"fp8-s0": "failed"}))
    found = sentence(verdict, "fp8")
    assert found["result"] == "not shown"
    assert "an arm with failed cells is not called equivalent" in found["text"]
    assert "failed: fp8-s0" in found["beside"]
    assert "Failed: 1 of 12 cells (fp8-s0)." in verdict["notes"]


def test_few_noisy_seeds_show_nothing_and_say_how_many_would(tmp_path: Path) -> None:
    arms = {"bf16": EQUAL, "fp8": EQUAL}
    verdict = make_verdict(simulate_study(tmp_path, arms, seeds=3, prompts=30, seed_sd=0.05))
    found = sentence(verdict, "fp8")
    assert found["result"] == "not shown"
    needed = verdict["arms"][1]["comparison"]["seeds_for_equivalence"]
    assert f"equal arms would need about {needed} seeds" in found["text"]
    assert needed > 3


def test_equal_arms_give_no_claim_of_a_difference(tmp_path: Path) -> None:
    arms = dict.fromkeys(("bf16", "a", "b", "c"), EQUAL)
    for seed in range(3):
        folder = simulate_study(tmp_path / str(seed), arms, seeds=4, prompts=30, samples=4, steps=20, rng_seed=seed)
        claims = {one["result"] for one in make_verdict(folder)["sentences"]}
        assert not claims & {"lower", "higher", "collapses"}


def test_an_arm_without_a_finished_cell_is_not_left_out(tmp_path: Path) -> None:
    absent = {"fp8-s0": "failed", "fp8-s1": "missing", "fp8-s2": "running"}
    verdict = make_verdict(simulate_study(tmp_path, {"bf16": EQUAL, "fp8": EQUAL}, seeds=3, absent=absent))
    found = sentence(verdict, "fp8")
    assert found["text"] == "fp8: not shown: no cell is done"
    assert found["beside"].endswith("failed: fp8-s0; missing: fp8-s1; running: fp8-s2")


def test_sizes_are_compared_one_by_one_and_four_of_them_get_a_power_law(tmp_path: Path) -> None:
    sizes = {"0.1M": 100_000, "1M": 1_000_000, "10M": 10_000_000, "100M": 100_000_000}
    folder = simulate_study(tmp_path, {"bf16": EQUAL, "nvfp4": WORSE}, sizes=sizes, seeds=3, prompts=30, steps=20)
    verdict = make_verdict(folder)
    assert [one["size"] for one in verdict["sentences"] if one["about"] == "reward"] == list(sizes)
    assert verdict["scale"]["nvfp4"]["p"] > 0.001, "the mismatch does not depend on size here"
    assert "nvfp4 at 10M: " in verdict["sentences"][2]["text"]


def test_one_sample_a_prompt_and_a_log_without_rewards_are_no_collapse(tmp_path: Path) -> None:
    """One sample tells nothing of its own noise, and a reward that was not logged is not a broken one."""
    arms = {"bf16": TrueArm(top=0.32), "fp8": TrueArm(top=0.32)}
    greedy = simulate_study(tmp_path / "greedy", arms, seeds=3, prompts=20, samples=1)
    assert {one["result"] for one in make_verdict(greedy)["sentences"]} == {"not shown", "no collapse"}
    folder = simulate_study(tmp_path / "bare", arms, seeds=3, prompts=20, samples=4, steps=4)
    path = folder / "results" / "steps.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["reward"]), path)
    evals = folder / "results" / "evals.parquet"
    table = pq.read_table(evals)
    pq.write_table(table.filter(np.array(table["step"]) <= 2), evals)
    verdict = make_verdict(folder)
    assert verdict["arms"][0]["stability"]["series"] == "training"
    assert {one["result"] for one in verdict["sentences"] if one["about"] == "collapse"} == {"no collapse"}


def test_no_reference_no_margin_and_unpaired_arms_are_said(tmp_path: Path) -> None:
    arms = {"bf16": EQUAL, "fp8": EQUAL}
    alone = make_verdict(simulate_study(tmp_path / "a", arms, seeds=3, steps=20, reference=None))
    assert sentence(alone, "fp8")["text"] == "fp8: not compared: no reference arm is named"
    free = make_verdict(simulate_study(tmp_path / "b", arms, seeds=3, steps=20, margin=None))
    assert sentence(free, "fp8")["text"].startswith("fp8: no difference from bf16 shown (95 % interval")
    folder = simulate_study(tmp_path / "c", arms, seeds=3, steps=20)
    path = folder / "results" / "study.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "paired": False}))
    assert sentence(make_verdict(folder), "fp8")["text"] == "fp8: not compared: the study is not paired"


def test_an_empty_study_has_a_verdict_that_says_so(tmp_path: Path) -> None:
    absent = {"bf16-s0": "missing", "fp8-s0": "missing"}
    folder = simulate_study(tmp_path, {"bf16": EQUAL, "fp8": EQUAL}, seeds=1, absent=absent)
    verdict = make_verdict(folder)
    assert [one["text"] for one in verdict["sentences"]] == ["fp8: not shown: no cell is done"]


def test_damaged_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there are no results at .*study.json: `megatron-rl study run` writes them"):
        make_verdict(tmp_path)
    folder = simulate_study(tmp_path / "s", {"bf16": EQUAL, "fp8": EQUAL}, seeds=1, steps=20)
    evals = folder / "results" / "evals.parquet"
    table = pq.read_table(evals)
    other = np.array(table["prompt"]) + np.where(np.array(table["cell"]) == "fp8-s0", 1, 0)
    pq.write_table(table.set_column(table.column_names.index("prompt"), "prompt", [other]), evals)
    with pytest.raises(UserError, match="bf16-s0 and fp8-s0 answered different held-out prompts"):
        make_verdict(folder)
    evals.write_bytes(b"not a table")
    with pytest.raises(UserError, match=r"evals.parquet cannot be read .*restore it, or run the study again"):
        make_verdict(folder)
