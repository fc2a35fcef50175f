"""Doctor: a report of what this machine supports, before a run needs it. Takes seconds and starts nothing."""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from megatron_rl.config import SGLangConfig
from megatron_rl.engines.processes.engine_packages import own_packages, read_packages
from megatron_rl.errors import EngineError, PrecisionError
from megatron_rl.precision.machine import RECIPES, Machine, load_transformer_engine, this_machine, unsupported_reason
from megatron_rl.precision.tensor_cores import MODES, missing_feature

PACKAGES = ("torch", "megatron-core", "transformers", "triton")
ON_GPU = ("transformer-engine", "nvidia-nccl-cu13")  # further packages that compute or send there


def print_report() -> None:
    """Print a table of versions and capabilities, and warnings about misleading installations."""
    machine = this_machine()
    cuda = machine.capability is not None
    table = Table("what", "here", "means", title="megatron-rl doctor")
    table.add_row("python", platform.python_version(), "3.11 or 3.12 is supported")
    for name in PACKAGES:
        table.add_row(name, _version(name) or "-", "noise kernels" if name == "triton" and cuda else "")
    table.add_row(*sglang_row(SGLangConfig().python))
    device = f"{torch.cuda.get_device_name(0)} ({machine.name})" if cuda else f"CPU, {os.cpu_count()} cores"
    table.add_row("device", device, "NCCL" if cuda else "gloo; megatron-core through the device port")
    broken = transformer_engine_error(machine)
    table.add_row("transformer-engine", _version("transformer-engine") or "-", broken or "loads")
    layers = "Transformer Engine" if broken is None else "megatron-core local"
    table.add_row("layer spec", layers, "TE needs CUDA and transformer-engine")
    table.add_row("apex kernels", "yes" if _has_nvidia_apex() else "no", "optional; torch kernels otherwise")
    for label, here, means in [*gpu_rows(machine, SGLangConfig().python), *precision_rows(machine, broken)]:
        table.add_row(label, here, means)
    Console().print(table)
    for warning in warnings():
        print(f"warning: {warning}")


def describe_machine() -> dict[str, Any]:
    """Return the device and the versions of the packages that compute on it, as JSON data."""
    device = None
    if torch.cuda.is_available():
        device = {"name": torch.cuda.get_device_name(0), "count": torch.cuda.device_count()}
    versions = {name: _version(name) for name in (*PACKAGES, *ON_GPU)}
    return {"device": device, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "versions": versions}


def sglang_row(python: Path) -> tuple[str, str, str]:
    """Return the table row with the SGLang version of interpreter `python`, which serves rollout.engine: sglang."""
    if not python.is_file():
        return "sglang", "-", f"`make sglang` makes {python}"
    try:
        packages = read_packages(python)
    except EngineError as error:
        return "sglang", "-", str(error)
    if packages.sglang is None:
        return "sglang", "-", f"{python} has no sglang: `make sglang`"
    reason = packages.missing_on_gpu()
    return "sglang", packages.sglang, f"by {python}" + (f"; not on GPUs: {reason}" if reason else "; also on GPUs")


def gpu_rows(machine: Machine, python: Path) -> list[tuple[str, str, str]]:
    """Return the table rows that matter with GPUs alone: their number, NCCL of both sides, cuDNN, Transformer Engine.

    Args:
        machine: the machine.
        python: the interpreter of SGLang's servers.
    """
    if machine.capability is None:
        return []
    ours, theirs = own_packages(), None
    if python.is_file():
        with suppress(EngineError):  # `sglang_row` says what is wrong with this interpreter
            theirs = read_packages(python).nccl
    same = (
        "equal, as transport: distributed needs" if ours.nccl == theirs else "transport: distributed needs them equal"
    )
    cudnn = torch.backends.cudnn.version() or 0
    rows = [
        ("GPUs", str(machine.gpus), "one for each rank, and those of engines after them"),
        ("NCCL", f"{ours.nccl or '-'}, sglang {theirs or '-'}", same),
        ("cuDNN", str(cudnn), "9.12 or newer for Transformer Engine" if cudnn < 91200 else "new enough"),
    ]
    if (version := _version("transformer-engine")) is not None:
        stated = importlib.metadata.requires("megatron-core") or ()
        rows.append(("TE range", version, te_range(version, _version("megatron-core") or "-", stated)))
        rows.append(("precision.train: fp32", "local layers", "Transformer Engine's products would be TF32"))
    return rows


def te_range(version: str, core: str, stated: Iterable[str]) -> str:
    """Return whether a version of Transformer Engine is one that the installed megatron-core was made for.

    Args:
        version: version of Transformer Engine.
        core: version of megatron-core.
        stated: megatron-core's own requirements. Those of 0.16.1 have a range, and those of 0.19 have none.
    """
    found = [one for one in map(Requirement, stated) if one.name == "transformer-engine"]
    wanted = next((one.specifier for one in found if one.specifier), None)
    if wanted is None:
        return f"megatron-core {core} states no range"
    if wanted.contains(version, prereleases=True):
        return f"in the range of megatron-core {core} ({wanted})"
    return f"outside the range of megatron-core {core} ({wanted}): some fused kernels may be lost"


def precision_rows(machine: Machine, broken: str | None) -> list[tuple[str, str, str]]:
    """Return the table rows of the FP8 recipes and of the FP8 products that torch itself has on the device.

    `broken` is the reason why Transformer Engine cannot be used; None if it can be used.
    """
    device = torch.device("cpu" if machine.capability is None else "cuda")
    works = [mode for mode in MODES if missing_feature(mode, device) is None]
    lacks = [mode for mode in MODES if mode not in works]
    products = (
        "torch scaled_mm",
        ", ".join(works) or "none",
        f"not here: {', '.join(lacks)}" if lacks else "all modes",
    )
    if machine.capability is None:
        return [("FP8 recipes", "emulated", ", ".join(RECIPES)), products]
    if broken is not None:
        return [("FP8 recipes", "none", "they need Transformer Engine"), products]
    unable = [name for name in RECIPES if unsupported_reason(name, machine, pow2=True) is not None]
    able = [
        name if unsupported_reason(name, machine) is None else f"{name} (pow2_scales: true)"
        for name in RECIPES
        if name not in unable
    ]
    here = f"native: {', '.join(able)}" if able else "none"
    return [("FP8 recipes", here, f"not here: {', '.join(unable)}" if unable else "all recipes"), products]


def transformer_engine_error(machine: Machine) -> str | None:
    """Return why Transformer Engine's layers cannot be used here, None if they can. It is loaded only with CUDA."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "not installed"
    if machine.capability is None:
        return "not used without CUDA"
    try:
        load_transformer_engine(machine)
    except PrecisionError as error:
        return str(error).splitlines()[0]
    return None


def warnings() -> list[str]:
    """Return warnings about packages that are installed but do not work as their name suggests."""
    found = []
    if importlib.util.find_spec("apex") is not None and not _has_nvidia_apex():
        found.append(
            "a package called 'apex' without NVIDIA's kernels (amp_C) is installed: the one on PyPI is an unrelated "
            "web toolkit and breaks megatron-core's norms; remove it with `pip uninstall apex`"
        )
    if importlib.util.find_spec("transformer_engine") is not None and not torch.cuda.is_available():
        found.append(
            "transformer-engine is installed without CUDA: megatron-core may fail to import; use an environment "
            "without it"
        )
    return found


def _has_nvidia_apex() -> bool:
    return importlib.util.find_spec("amp_C") is not None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
