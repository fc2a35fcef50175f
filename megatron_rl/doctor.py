"""What this machine can do, said before a run has to find out."""

import importlib.metadata
import importlib.util
import os
import platform

import torch
from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine", "sglang", "triton")


def examine() -> None:
    """Print a table of versions and capabilities, and warnings where an installation would mislead."""
    table = Table("what", "here", "means", title="megatron-rl doctor")
    table.add_row("python", platform.python_version(), "3.11 or 3.12 is supported")
    for name in PACKAGES:
        table.add_row(name, _version(name) or "-", "")
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name(0) if cuda else f"CPU, {os.cpu_count()} cores"
    table.add_row("device", device, "NCCL" if cuda else "gloo; megatron-core through the device port")
    te = cuda and importlib.util.find_spec("transformer_engine") is not None
    table.add_row("layer spec", "Transformer Engine" if te else "megatron-core local", "TE needs CUDA and transformer-engine")
    table.add_row("apex kernels", "yes" if _has_nvidia_apex() else "no", "optional; torch kernels otherwise")
    Console().print(table)
    for warning in warnings():
        print(f"warning: {warning}")


def warnings() -> list[str]:
    """What looks installed but is not what its name says."""
    found = []
    if importlib.util.find_spec("apex") is not None and not _has_nvidia_apex():
        found.append(
            "a package called 'apex' without NVIDIA's kernels (amp_C) is installed: the one on PyPI is an unrelated web "
            "toolkit and breaks megatron-core's norms; remove it with `pip uninstall apex`"
        )
    if importlib.util.find_spec("transformer_engine") is not None and not torch.cuda.is_available():
        found.append(
            "transformer-engine is installed without CUDA: megatron-core may fail to import; use an environment without it"
        )
    return found


def _has_nvidia_apex() -> bool:
    return importlib.util.find_spec("amp_C") is not None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
