"""The doctor tries what it reports."""

import importlib.metadata
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_rl import cli, doctor
from megatron_rl.engines.processes.engine_packages import (
    EnginePackages,
    check_gpu_packages,
    own_packages,
    read_packages,
)
from megatron_rl.errors import ConfigError, EngineError, PrecisionError
from megatron_rl.precision import machine as machine_module
from megatron_rl.precision.machine import RECIPES, Machine
from megatron_rl.precision.tensor_cores import MODES, missing_feature, operands, scaled_mm

CPU = Machine()
HOPPER = Machine((9, 0), (13, 0), transformer_engine=True)
BLACKWELL = Machine((10, 0), (13, 0), transformer_engine=True)
needs_cpu_products = pytest.mark.skipif(
    not hasattr(torch.nn.functional, "scaled_mm") or torch.__version__ < "2.13",
    reason="torch before 2.13 lacks them on CPU",
)


def test_a_machine_without_cuda_emulates_every_recipe():
    (recipes, products) = doctor.precision_rows(CPU, "not installed")
    assert recipes == ("FP8 recipes", "emulated", ", ".join(RECIPES))
    assert products[0] == "torch scaled_mm"


@needs_cpu_products
def test_products_that_torch_has_are_told_from_those_it_lacks():
    _, (_, here, lacking) = doctor.precision_rows(CPU, "not installed")
    assert here == "TensorWise, RowWise" and lacking == "not here: BlockWise1x128, BlockWise128x128"


def test_a_product_that_is_missing_says_which_and_where():
    reason = missing_feature("BlockWise128x128", torch.device("cpu"))
    assert reason is not None and ("BlockWise128x128 on cpu" in reason or "no torch.nn.functional.scaled_mm" in reason)
    a, b = operands(torch.randn(128, 256), torch.randn(128, 256), "BlockWise1x128")
    with pytest.raises(PrecisionError):
        scaled_mm(a, b, "BlockWise1x128")


@needs_cpu_products
def test_a_product_that_is_wrong_counts_as_missing(monkeypatch):
    real = torch.nn.functional.scaled_mm
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", lambda *args, **named: 1.5 * real(*args, **named))
    assert "off by" in (missing_feature("TensorWise", torch.device("cpu")) or "")


@needs_cpu_products
@pytest.mark.parametrize("mode", ["TensorWise", "RowWise"])
def test_torchs_product_of_codes_is_the_product_of_what_they_stand_for(mode):
    generator = torch.Generator().manual_seed(3)
    a, b = operands(torch.randn(64, 384, generator=generator), 0.02 * torch.randn(128, 384, generator=generator), mode)
    product = scaled_mm(a, b, mode, torch.float32)
    torch.testing.assert_close(product, a.dequantize() @ b.dequantize().t(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_scales_have_the_shapes_that_each_mode_is_named_for(mode):
    a, b = operands(torch.randn(128, 640), torch.randn(256, 640), mode)
    shapes = {"TensorWise": ((), ()), "RowWise": ((128, 1), (256, 1))}
    shapes |= {"BlockWise1x128": ((128, 5), (256, 5)), "BlockWise128x128": ((128, 5), (2, 5))}
    assert (a.scale_inv.shape, b.scale_inv.shape) == shapes[mode]


def test_recipes_of_a_gpu_need_transformer_engine_and_its_architecture(monkeypatch):
    monkeypatch.setattr(doctor, "missing_feature", lambda mode, device: None)  # no GPU here to try products on
    assert doctor.precision_rows(HOPPER, "cannot be loaded: no libnccl")[0][1:] == (
        "none",
        "they need Transformer Engine",
    )
    assert doctor.precision_rows(HOPPER, None)[0][1:] == (
        "native: delayed, tensorwise, blockwise",
        "not here: mxfp8, nvfp4",
    )
    here = doctor.precision_rows(BLACKWELL, None)[0][1]
    assert here == "native: delayed, tensorwise, blockwise (pow2_scales: true), mxfp8, nvfp4"


def test_transformer_engine_that_does_not_load_is_told_apart_from_none(monkeypatch, tmp_path):
    assert doctor.transformer_engine_error(HOPPER) == "not installed"
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise OSError('libnccl.so.2 not found\\nmore')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.transformer_engine_error(CPU) == "not used without CUDA"
    told = doctor.transformer_engine_error(HOPPER)
    assert told is not None and "cannot be loaded (libnccl.so.2 not found" in told and "\n" not in told
    assert "installed without CUDA" in "".join(doctor.warnings()) or torch.cuda.is_available()


def test_sglangs_environment_is_asked_for_its_version(tmp_path: Path):
    python = tmp_path / "bin" / "python"
    assert doctor.sglang_row(python) == ("sglang", "-", f"`make sglang` makes {python}")
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    assert doctor.sglang_row(python)[1:] == ("-", f"{python} has no sglang: `make sglang`")
    python.unlink()
    lists_packages(python, sglang="0.5.23", torch="2.13.0+cpu")
    assert doctor.sglang_row(python)[1:] == ("0.5.23", f"by {python}; not on GPUs: its torch 2.13.0+cpu is for CPUs")
    lists_packages(python, **SERVES_ON_GPU)
    assert doctor.sglang_row(python)[2] == f"by {python}; also on GPUs"


SERVES_ON_GPU = {
    "sglang": "0.5.23",
    "torch": "2.14.1",
    "sglang-kernel": "0.4.10",
    "flashinfer-python": "0.7.2",
    "nvidia-nccl-cu13": "2.30.7",
}


def lists_packages(python: Path, **versions: str) -> None:
    """Write an interpreter that lists these packages."""
    python.write_text(f"#!/bin/sh\necho '{json.dumps(versions)}'\n")
    python.chmod(0o755)


def test_on_a_gpu_the_doctor_compares_the_gpus_and_nccl_of_both_sides(tmp_path):
    python = tmp_path / "python"
    lists_packages(python, **SERVES_ON_GPU)
    rows = {label: (here, means) for label, here, means in doctor.gpu_rows(replace(HOPPER, gpus=8), python)}
    assert rows["GPUs"][0] == "8" and "sglang 2.30.7" in rows["NCCL"][0] and "need them equal" not in rows["NCCL"][1]
    assert doctor.gpu_rows(CPU, python) == []
    python.write_text("#!/bin/sh\nexit 1\n")
    rows = {label: (here, means) for label, here, means in doctor.gpu_rows(replace(HOPPER, gpus=8), python)}
    assert rows["NCCL"][0].endswith("sglang -") and "cannot list its packages" in doctor.sglang_row(python)[2]


def test_transformer_engine_is_told_whether_megatron_core_was_made_for_it():
    """What 0.16.1 and 0.19.2 require, and what is installed here."""
    old = ["torch", 'transformer-engine[core_cu13,pytorch]<2.12.0,>=2.9.0a0; extra == "dev"']
    new = ["torch", 'transformer-engine[core_cu13,pytorch]; extra == "te"']
    for version, told in {"2.8.0": "outside", "2.9.0": "in", "2.11.0": "in", "2.12": "outside"}.items():
        assert doctor.te_range(version, "0.16.1", old).split()[0] == told
    assert doctor.te_range("2.20.2", "0.19.2", new) == "megatron-core 0.19.2 states no range"
    assert "range" in doctor.te_range("2.11.0", "x", importlib.metadata.requires("megatron-core"))


def test_an_environment_that_cannot_serve_on_a_gpu_is_refused_before_it_is_started():
    ours = EnginePackages({"nvidia-nccl-cu13": "2.30.7"})
    here = Path("python")
    check_gpu_packages(here, EnginePackages(SERVES_ON_GPU), ours, broadcasts=True)
    for lacking, words in (
        ({"torch": "2.14.1+cpu"}, "for CPUs"),
        ({"sglang-kernel": None}, r"lacks sglang-kernel; run `make sglang GPU=1`"),
    ):
        changed = {name: value for name, value in (SERVES_ON_GPU | lacking).items() if value is not None}
        with pytest.raises(EngineError, match=words):
            check_gpu_packages(here, EnginePackages(changed), ours, broadcasts=False)
    other = EnginePackages({"nvidia-nccl-cu13": "2.29.7"})
    check_gpu_packages(here, EnginePackages(SERVES_ON_GPU), other, broadcasts=False)
    with pytest.raises(EngineError, match=r"one NCCL on both sides: python has 2\.30\.7, the trainer 2\.29\.7"):
        check_gpu_packages(here, EnginePackages(SERVES_ON_GPU), other, broadcasts=True)


def test_the_packages_of_an_interpreter_are_those_that_it_has():
    found = read_packages(Path(sys.executable))
    assert found.versions["megatron-core"] == own_packages().versions["megatron-core"]


def test_a_transformer_engine_whose_own_checks_fail_is_an_error_with_words(monkeypatch):
    def fails(name: str) -> None:
        raise AssertionError

    monkeypatch.setattr(machine_module.importlib, "import_module", fails)
    with pytest.raises(PrecisionError, match=r"cannot be loaded \(AssertionError\): repair or remove it"):
        machine_module.load_transformer_engine(HOPPER)


def test_the_doctor_fits_on_a_screen(capsys):
    doctor.print_report()
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 24
    for word in ("transformer-engine", "apex kernels", "scaled_mm", "FP8 recipes", "triton"):
        assert word in out


def test_overrides_without_a_configuration_are_refused():
    with pytest.raises(ConfigError, match=r"override 'precision\.recipe=mxfp8' has no configuration"):
        cli.doctor(overrides=["precision.recipe=mxfp8"])


def test_a_configuration_that_cannot_run_exits_with_2_and_one_paragraph(qwen3, tmp_path: Path, monkeypatch, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(f"model: {{path: {qwen3}}}\n")
    arguments = ["doctor", "--config", str(file), "precision.recipe=delayed", "precision.first_last_bf16=true"]
    monkeypatch.setattr(sys, "argv", ["megatron-rl", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and said.startswith("ConfigError: precision.first_last_bf16") and "\n" not in said
