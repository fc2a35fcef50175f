"""Replacements of what SGLang lacks without CUDA. Only SGLang's own processes on CPU have this folder on PYTHONPATH.

1. The default wheel of torchvision is linked against CUDA torch. Its library does not load with a CPU torch, and its
   import fails while it registers fakes of operators that do not exist. Their schemas are declared first. No code calls
   these operators.
2. The buffer for routed experts is pinned through cudart. Without CUDA there is nothing to pin.
3. A server starts its scheduler and its detokenizer as new processes, because CUDA does not survive a fork. Each of
   them imports SGLang again, for 10 to 20 seconds. Without CUDA they are forked.
"""

import importlib.abc
import importlib.util
import multiprocessing
import sys
from typing import Any


class _Before(importlib.abc.MetaPathFinder):
    """Declares torchvision's operators before it is imported, and unpins SGLang's host buffers after that import."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            _declare_torchvision_operators()
        if name == "sglang.srt.mem_cache.pool_host.common":
            return self._unpinned(name)
        return None

    def _unpinned(self, name):
        sys.meta_path.remove(self)
        try:
            spec: Any = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        execute = spec.loader.exec_module

        def execute_and_unpin(module):
            execute(module)
            module._cuda_host_register = lambda *_, **__: None

        spec.loader.exec_module = execute_and_unpin
        return spec


_declared: list[Any] = []  # operators are removed when their torch.library.Library is collected


def _declare_torchvision_operators():
    if _declared:
        return
    import torch  # not at the top: every Python process of the server runs this file

    library = torch.library.Library("torchvision", "DEF")
    for schema in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",):
        library.define(schema)
        library.define(f"q{schema}")
    _declared.append(library)


def _fork(method, force=False):
    _set_start_method("fork" if method == "spawn" else method, force=force)


_set_start_method = multiprocessing.set_start_method
multiprocessing.set_start_method = _fork
sys.meta_path.insert(0, _Before())
