"""Capabilities of this machine's device: which recipes run natively, which are emulated and which cannot run."""

import importlib
import importlib.util
from dataclasses import dataclass

import torch

from megatron_rl.errors import PrecisionError

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4")
Version = tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """The device and the software that decide which recipes can run.

    Attributes:
        capability: compute capability of the CUDA device ((9, 0) is Hopper), None on a CPU.
        cuda: CUDA version that torch was built for.
        transformer_engine: True if a package of that name is installed. Whether it loads is only checked on use. Always
            False on a CPU, except in tests, which run it there on torch's products.
        gpus: number of CUDA devices that this process sees.
    """

    capability: Version | None = None
    cuda: Version | None = None
    transformer_engine: bool = False
    gpus: int = 0

    @property
    def device(self) -> str:
        return "cpu" if self.capability is None else "cuda"

    @property
    def name(self) -> str:
        return "CPU" if self.capability is None else f"sm_{self.capability[0]}{self.capability[1]}"


def this_machine() -> Machine:
    """Return the description of the first CUDA device, or of the CPU if there is none."""
    if not torch.cuda.is_available():
        return Machine()
    major, _, minor = (torch.version.cuda or "0.0").partition(".")
    installed = importlib.util.find_spec("transformer_engine") is not None
    return Machine(torch.cuda.get_device_capability(0), (int(major), int(minor)), installed, torch.cuda.device_count())


def load_transformer_engine(machine: Machine) -> bool:
    """Import Transformer Engine if this machine has it. Return whether it has.

    Raises:
        PrecisionError: it is installed but cannot be imported. megatron-core's local layers are not a fallback, because
            they compute something else.
    """
    if not machine.transformer_engine:
        return False
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError, AssertionError) as error:  # its own checks of versions are assertions
        why = str(error) or type(error).__name__
        raise PrecisionError(
            f"transformer-engine is installed but cannot be loaded ({why}): repair or remove it"
        ) from error
    return True


def uses_transformer_engine(dtype: torch.dtype, machine: Machine) -> bool:
    """Return whether the layers are Transformer Engine's, or else megatron-core's local ones.

    In float32 its products on a GPU are TF32, whatever torch's settings are. Of its kernels of attention only the
    unfused one takes float32, and that stores the scores of all heads and sequences: 30 GB a layer at 4096 tokens.

    Args:
        dtype: dtype of the model's parameters.
        machine: the machine.
    """
    return machine.transformer_engine and not (machine.device == "cuda" and dtype == torch.float32)


def unsupported_reason(recipe: str, machine: Machine, *, pow2: bool = False) -> str | None:
    """Return why the device cannot run `recipe` natively, None if it can.

    The conditions are those of Transformer Engine's own checks and kernels.

    Args:
        recipe: one of `RECIPES`.
        machine: the device to check.
        pow2: True if scales are powers of two (`blockwise` only).
    """
    at = machine.capability
    if at is None:
        return "it is a CPU"
    if at < (8, 9):
        return "FP8 needs sm_89 or newer"
    if recipe in ("mxfp8", "nvfp4") and at < (10, 0):
        return f"{recipe} needs sm_100 or newer"
    if recipe == "mxfp8" and at >= (12, 0):
        return "mxfp8 runs on sm_100 to sm_119"
    if recipe == "blockwise" and (at < (9, 0) or (machine.cuda or (0, 0)) < (12, 9)):
        return "blockwise needs sm_90 or newer and CUDA 12.9 or newer"
    if recipe == "blockwise" and at >= (10, 0) and not pow2:
        return "from sm_100 on, blockwise runs with power-of-two scales alone: precision.pow2_scales: true"
    return None


def execution_mode(recipe: str, machine: Machine, *, pow2: bool = False) -> str:
    """Return how `recipe` is computed on this machine.

    Args:
        recipe: one of `RECIPES`.
        machine: the device to check.
        pow2: True if scales are powers of two (`blockwise` only).

    Returns:
        `native` on a CUDA device, `emulated` (quantized exactly, multiplied in float32) on a CPU.

    Raises:
        PrecisionError: the CUDA device cannot run the recipe, or Transformer Engine is not installed. Training never
            falls back to bf16 silently.
    """
    if machine.capability is None:
        return "emulated"
    reason = unsupported_reason(recipe, machine, pow2=pow2)
    if reason is not None:
        able = [name for name in RECIPES if unsupported_reason(name, machine, pow2=name == "blockwise") is None]
        raise PrecisionError(
            f"precision.recipe {recipe} cannot run on this device ({machine.name}): {reason}. "
            f"Recipes it can run: {', '.join(able) or 'none'}; a CPU emulates all of them (CUDA_VISIBLE_DEVICES=)"
        )
    if not machine.transformer_engine:
        raise PrecisionError(
            f"precision.recipe {recipe} needs Transformer Engine on a CUDA device, and it is not installed: "
            "megatron-core would train in bf16 without a word. Install it (pip install 'megatron-rl[gpu]'), or set "
            "precision.recipe: none"
        )
    return "native"
