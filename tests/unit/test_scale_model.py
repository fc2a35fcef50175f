"""The arithmetic of benchmarks/scale_model.py, against numbers that were worked by hand."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts find each other there

from scale_model import (  # noqa: E402
    KINDS,
    Coefficient,
    Sizes,
    Work,
    disk_sync,
    first_excess,
    mark,
    read_coefficients,
    step_seconds,
    terms,
)

WORTH = {
    "client_s": 2.7e-6,
    "control_s": 3e-3,
    "batch_bw": 1e9,
    "bucket_s": 0.01,
    "hash_bw": 2e9,
    "generate_rate": 2500,
    "token_s": 0.02,
    "peak_flops": 1e15,
    "mfu": 0.25,
    "bubble": 0.2,
    "link_bw": 20e9,
    "broadcast_bw": 30e9,
    "tensor_s": 1e-4,
    "probe_s": 6.0,
    "write_bw": 1.5e9,
    "read_bw": 100e9,
    "copy_bw": 25e9,
}
ROUND = {name: Coefficient(value, "", "measured", "", "engines", 64) for name, value in WORTH.items()}
WORK = Work(prompts=512, mean_tokens=4096, parameters=30e9, active=3e9, tensors=10_000, bucket_bytes=1e9)
SIZES = Sizes.of(1024, WORK)


def seconds(name: str, work: Work = WORK, at: Sizes = SIZES) -> float:
    return terms(ROUND, work, at)[name].seconds


def test_half_of_the_gpus_train_and_half_generate():
    assert Sizes(512, 512, 128) == SIZES and Sizes.of(8, WORK) == Sizes(4, 4, 1)
    assert WORK.tokens == 33_554_432


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("generate", 33_554_432 / (512 * 2500)),
        ("tail", 16_384 * 0.02),
        ("ingest", 33_554_432 * 2.7e-6),
        # Two passes. Rank 0 sends a share to each of 63 other replicas, and a share takes 3 hops to the 8 ranks of one.
        ("batch", 2 * 33_554_432 * 16 * (63 + 3) / 64 / 1e9),
        ("train", 8 * 3e9 * 33_554_432 / (512 * 1e15 * 0.25 * 0.8)),
        ("reduce", 6 * 30e9 / 8 / 20e9),
        ("export", 60e9 / 20e9 + 1),
        ("send", 60e9 / 30e9 + 60 * 0.01),
        ("control", (7 + 60) * 128 * 3e-3),
        ("confirm", 60e9 / 2e9 + 6),
        ("save", 16 * 30e9 / (512 * 25e9) / 20),
    ],
)
def test_every_term_of_a_large_step(name, expected):
    assert seconds(name) == pytest.approx(expected)


def test_routed_experts_are_a_hundred_times_the_bytes_of_a_token():
    replayed = replace(WORK, replays=True)
    assert replayed.token_bytes == 16 + 4 * 48 * 8
    assert seconds("batch", replayed) / seconds("batch") == pytest.approx(1552 / 16)


def test_one_rank_is_sent_nothing_and_one_replica_the_whole_batch():
    assert seconds("batch", at=Sizes(1, 1, 1)) == 0
    assert seconds("batch", at=Sizes(2, 1, 1)) == pytest.approx(2 * 33_554_432 * 16 / 1e9)


def test_through_a_folder_the_engines_read_one_after_the_other_what_rank_0_wrote():
    assert disk_sync(ROUND, WORK, SIZES).seconds == pytest.approx(60 / 1.5 + 128 * 60 / 100)


def test_a_step_adds_up_and_overlap_hides_the_shorter_half():
    parts = terms(ROUND, WORK, SIZES)
    s = {name: part.seconds for name, part in parts.items()}
    rest = s["export"] + s["send"] + s["control"] + s["confirm"] + s["save"]
    generation, learning = s["generate"] + s["tail"], s["batch"] + s["train"] + s["reduce"]
    assert step_seconds(parts, overlaps=False) == pytest.approx(generation + learning + rest)
    assert step_seconds(parts, overlaps=True) == pytest.approx(generation + rest)
    slow = terms(ROUND | {"client_s": replace(ROUND["client_s"], value=1e-3)}, WORK, SIZES)
    assert step_seconds(slow, overlaps=True) == pytest.approx(33_554.432 + rest)


def test_a_cell_says_what_it_is_worth():
    ingest = terms(ROUND, WORK, SIZES)["ingest"]
    assert mark(ROUND, ingest, Sizes(64, 64, 64)) == "" and mark(ROUND, ingest, Sizes(64, 64, 65)) == "~"
    assumed = ROUND | {"client_s": replace(ROUND["client_s"], kind="assumed")}
    assert mark(assumed, ingest, Sizes(64, 64, 64)) == "?"


def test_what_grows_is_named_where_it_first_matters():
    free = {"token_s": 0.0, "hash_bw": 1e15, "probe_s": 0.0}
    quick = ROUND | {name: replace(ROUND[name], value=value) for name, value in free.items()}
    found = dict(reversed(pair) for pair in first_excess(quick, 0.1, (8, 64, 512, 1024), WORK))
    # Of 34 s at 64 GPUs: 5.7 s of ingest and 1.6 s of control. Of 65 s at 512: 12.9 s of control.
    assert (found["generate"], found["ingest"], found["control"]) == (8, 64, 512) and "save" not in found


def test_every_coefficient_has_a_source_and_is_in_the_document():
    found = read_coefficients()
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert found.keys() >= {name for part in terms(found, WORK, SIZES).values() for name in part.uses}
    for name, one in found.items():
        assert one.kind in KINDS and one.source and one.unit
        assert (one.kind == "measured") == bool(one.size and one.up_to)
        assert f"| `{name}` | {one.value:g} | {one.unit} | {one.kind}: {one.source} |" in text, name
