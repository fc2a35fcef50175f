"""Transformer Engine's Python package on a CPU: `run` calls a function of another test module on its layers.

Everything that is installed here is for a process that does nothing else. It must come before megatron-core is
imported. Only the compiled module (`compiled.py`), the device and the choice of an attention kernel are replaced.
"""

import functools
import importlib
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FOLDER = Path(__file__).parents[2] / ".te-cpu"
ONNX = "transformer_engine.pytorch.onnx_extensions"
# Functions that check or make a tensor on the device by the tensor's own methods.
DEVICE_SITES = (
    ("transformer_engine.pytorch.module.base", "TransformerEngineBaseModule.prepare_forward"),
    ("transformer_engine.pytorch.attention.dot_product_attention", "DotProductAttention.forward"),
)
_installed = False


def run(target: str, sabotage: str | None = None, **kwargs: Any) -> Any:
    """Call a function of the tests with Transformer Engine's layers.

    Args:
        target: `module:function`.
        sabotage: `transposed`: the gradient of the attention's output projection comes transposed from the product.
        kwargs: arguments of the function.
    """
    install()
    compiled = compiled_module()
    module, _, function = target.partition(":")
    called = getattr(importlib.import_module(module), function)
    if sabotage is None:
        return called(**kwargs)
    gemm: Any = importlib.import_module("transformer_engine.pytorch.cpp_extensions.gemm")
    assert gemm.tex is compiled
    right = compiled.generic_gemm
    compiled.generic_gemm = functools.partial(_transposed, right)
    try:
        return called(**kwargs)
    finally:
        compiled.generic_gemm = right


def compiled_module() -> Any:
    """Return the module that stands in for Transformer Engine's compiled one."""
    return sys.modules["transformer_engine_torch"]


def _transposed(right: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, ...]:
    """Compute a product. If it is the gradient of the attention's output projection, read its memory by columns."""
    a, _, b, transposed_b, *_ = arguments
    out, *others = right(*arguments, **options)
    if transposed_b and a.shape[-1] == 2 * b.shape[-1]:
        out.copy_(out.clone().t().reshape(out.shape))
    return out, *others


def install() -> None:
    """Make Transformer Engine's layers those of this process."""
    global _installed
    if _installed:
        return
    _installed = True
    sys.path.insert(0, str(FOLDER))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its own switch: do not load libraries
    from tests.te_cpu.compiled import CompiledModule  # heavy: imports torch

    sys.modules["transformer_engine_torch"] = CompiledModule(FOLDER / "transformer_engine")
    common: Any = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    sys.modules[ONNX] = _NotImported(ONNX)
    machine: Any = importlib.import_module("megatron_rl.precision.machine")
    machine.this_machine = lambda: machine.Machine(transformer_engine=True)
    modules: Any = importlib.import_module("megatron_rl.policy.modules")
    assert modules.HAVE_TE
    _install_device()
    _choose_unfused_attention()


class _NotImported(types.ModuleType):
    """A module of exports to ONNX, whose packages are not installed."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        from tests.te_cpu.compiled import Absent

        return Absent(f"{self.__name__}.{name}")


def _install_device() -> None:
    """Let Transformer Engine and megatron-core's extension of it see a Hopper whose memory is the host's."""
    import torch

    from megatron_rl.policy import device_port

    device_port.install_cpu_port()
    view: Any = device_port._cpu_view()
    hopper = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, name="CPU", uuid="0")
    view.cuda.__dict__.update(
        is_available=lambda: True,
        device_count=lambda: 1,
        get_device_properties=lambda device=None: hopper,
        get_device_capability=lambda device=None: (9, 0),
        is_current_stream_capturing=lambda: False,
    )
    importlib.import_module("megatron.core.extensions.transformer_engine").torch = view
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_engine.pytorch") and getattr(module, "torch", None) is torch:
            module.torch = view
    for name, path in DEVICE_SITES:
        owner, attribute = path.split(".")
        kind = getattr(importlib.import_module(name), owner)
        setattr(kind, attribute, _on_device(getattr(kind, attribute)))
    empty = torch.Tensor()
    for module in list(sys.modules.values()):
        if hasattr(module, "_empty_tensor") and module.__name__.startswith("transformer_engine"):
            module._empty_tensor = lambda: empty


def _on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function during which the tensors of the host are tensors of the device."""
    from torch import Tensor
    from torch.overrides import TorchFunctionMode

    class HostIsDevice(TorchFunctionMode):
        def __torch_function__(self, called: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = dict(kwargs or {})
            if called == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
                return True
            if called is Tensor.cuda:
                return args[0]
            if str(given.get("device")).startswith("cuda"):
                given["device"] = "cpu"
            return called(*args, **given)

    @functools.wraps(function)
    def ported(*args: Any, **kwargs: Any) -> Any:
        with HostIsDevice():
            return function(*args, **kwargs)

    return ported


def _choose_unfused_attention() -> None:
    """Let megatron-core choose the one attention of Transformer Engine that is not a kernel."""
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.transformer.enums import AttnBackend

    chosen = LanguageModule._set_attention_backend

    def unfused(self: Any) -> None:
        # A policy in the process that started this rank has left megatron-core's choice for other layers there.
        for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
            os.environ.pop(name, None)
        self.config.attention_backend = AttnBackend.unfused
        chosen(self)

    LanguageModule._set_attention_backend = unfused
