"""Packages in the environment of SGLang's servers, read without importing them, and whether they can serve."""

import importlib.metadata
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.errors import EngineError

# Only the metadata is read: importing torch takes seconds.
_ASK = """
import importlib.metadata as m, json
names = {(d.metadata["Name"] or "").lower().replace("_", "-"): d.version for d in m.distributions()}
print(json.dumps(names))
"""


@dataclass(frozen=True)
class EnginePackages:
    """Versions of the packages of an environment, by name in lower case with hyphens."""

    versions: Mapping[str, str]

    @property
    def sglang(self) -> str | None:
        """Version of SGLang, if it is installed."""
        return self.versions.get("sglang")

    @property
    def nccl(self) -> str | None:
        """Version of the NCCL that torch brings; None with a torch for CPUs, or one with a NCCL of the system."""
        found = [version for name, version in self.versions.items() if name.startswith("nvidia-nccl-cu")]
        return found[0] if found else None

    def missing_on_gpu(self) -> str | None:
        """Return why these packages cannot serve on a GPU, None if they can."""
        torch = self.versions.get("torch", "")
        if torch.endswith("+cpu"):
            return f"its torch {torch} is for CPUs"
        missing = [name for name in ("sglang-kernel", "flashinfer-python") if name not in self.versions]
        return f"it lacks {', '.join(missing)}" if missing else None


def own_packages() -> EnginePackages:
    """Return the packages of this interpreter's environment."""
    found = {
        (d.metadata["Name"] or "").lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()
    }
    return EnginePackages(found)


def read_packages(python: Path) -> EnginePackages:
    """Return the packages of another interpreter's environment. Raises EngineError if it cannot list them."""
    reply = subprocess.run([python.absolute(), "-I", "-c", _ASK], capture_output=True, text=True, check=False)
    if reply.returncode != 0:
        raise EngineError(f"rollout.sglang.python: {python} cannot list its packages: {reply.stderr.strip()[-300:]}")
    return EnginePackages(json.loads(reply.stdout))


def check_gpu_packages(python: Path, theirs: EnginePackages, ours: EnginePackages, *, broadcasts: bool) -> None:
    """Check that an environment can serve on a GPU and, for a broadcast, that both sides have one NCCL.

    Args:
        python: the interpreter of the environment, for the message.
        theirs: its packages.
        ours: the trainer's packages.
        broadcasts: weights are broadcast with NCCL.

    Raises:
        EngineError: it cannot, or NCCL differs, which NCCL itself refuses ("Mismatched NCCL version detected").
    """
    reason = theirs.missing_on_gpu()
    if reason is not None:
        raise EngineError(
            f"rollout.sglang.python: {python} cannot serve on a GPU: {reason}; run `make sglang GPU=1`, or hide the "
            "GPUs (CUDA_VISIBLE_DEVICES=)"
        )
    if broadcasts and theirs.nccl and ours.nccl and theirs.nccl != ours.nccl:
        raise EngineError(
            f"rollout.transport: distributed needs one NCCL on both sides: {python} has {theirs.nccl}, the trainer "
            f"{ours.nccl}; install the same torch in both (requirements/gpu.txt, sglang-gpu.txt), or take transport: "
            "tensor or disk"
        )
