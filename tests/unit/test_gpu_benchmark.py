"""benchmarks/gpu.py: its arithmetic, its limits and its refusals; its sections run at toy size on a CPU."""

import io
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts find each other there

import gpu
from gpu_figures import TINY, peak_flops, step_flops, table_of, utilization

SIZE = TINY["tiny"]


@pytest.fixture
def settings(tmp_path):
    return gpu.Settings("cpu", True, 1, tmp_path)


def test_the_operations_of_a_step_are_those_that_torch_counts():
    """torch counts all scores of attention, of which a causal kernel computes half; and RoPE's small product."""
    heads = {"num_attention_heads": SIZE.heads, "num_key_value_heads": SIZE.kv_heads, "head_dim": SIZE.head_dim}
    sizes = {"hidden_size": SIZE.hidden, "intermediate_size": 3 * SIZE.hidden, "num_hidden_layers": SIZE.layers}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=SIZE.vocab, attn_implementation="eager", **heads, **sizes))
    with FlopCounterMode(display=False) as counted:
        model(torch.arange(96)[None]).logits.sum().backward()
    flops = step_flops(SIZE, [96], 96)
    expected = flops["layers"] + 2 * flops["attention"] + flops["head"]
    assert counted.get_total_flops() == pytest.approx(expected, rel=1e-3)
    assert flops["attention"] > 2e-3 * expected, "attention is large enough to be seen"


def test_sequences_do_not_attend_to_each_other():
    one, two = step_flops(SIZE, [64], 10), step_flops(SIZE, [32, 32], 10)
    assert two["attention"] == one["attention"] / 2
    assert (two["layers"], two["head"]) == (one["layers"], one["head"])


def test_utilization_is_a_part_of_the_peak_of_a_known_device():
    assert utilization(989.4e12, 4.0, "NVIDIA H200") == 0.25
    assert peak_flops("NVIDIA H100 PCIe") < peak_flops("NVIDIA H100 80GB HBM3")
    assert utilization(1e12, 1.0, "CPU") is None


def test_every_wait_of_one_line_is_counted():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for text in 3 * ["called a synchronizing CUDA operation"] + ["something else"]:
            warnings.warn(text, stacklevel=1)
    assert list(gpu.waits(said).values()) == [3]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "torch sees no GPU"), (["--device", "cpu"], "add --tiny"), (["--only", "steps"], "invalid choice")],
)
def test_what_cannot_be_measured_is_refused_with_words(arguments, words, capsys):
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert words in capsys.readouterr().err


def test_a_step_is_measured_in_bf16_and_in_both_recipes(settings):
    rows = list(gpu.step_rows(settings))
    assert [row["recipe"] for row in rows] == ["none", "blockwise", "tensorwise"]
    assert all(row["ms"] > 0 and row["peak MiB"] > 0 and row["MFU"] is None for row in rows)


def test_the_head_and_alp_are_measured(settings):
    bf16, fp32 = gpu.logprob_rows(settings)
    assert bf16["ms"] > 0 and fp32["ms"] > 0
    (row,) = gpu.alp_rows(settings)
    assert row["ms with"] > 0 and row["overhead"] > -1


@pytest.mark.parametrize("section", [gpu.broadcast_rows, gpu.mapping_rows])
def test_weights_arrive_in_another_process(settings, section):
    (row,) = section(settings)
    assert row["GB"] == pytest.approx(2e-9 * SIZE.weights) and row["GB/s"] > 0


def test_a_section_that_takes_too_long_is_ended(settings):
    found = gpu.measure("step", settings, 0.0)
    assert found["error"] == "it did not end within 0 s" and found["rows"] == []


def test_the_script_writes_what_computed_it_and_why_a_section_was_skipped(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--tiny", "--only", "syncs", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["machine"]["versions"]["torch"] == torch.__version__ and report["options"]["tiny"]
    assert "for a GPU alone" in report["sections"]["syncs"]["skipped"]
    assert "for a GPU alone" in capsys.readouterr().out


def test_a_table_has_rows_and_says_what_ended_the_section():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table_of("x", {"rows": [{"a": 1.23456, "b": None}], "skipped": None, "error": "late", "seconds": 2}))
    text = console.export_text()
    assert "1.235" in text and "late" in text and "x, 2 s" in text
