"""What SGLang lacks on a machine without CUDA. On PYTHONPATH of SGLang's own processes on CPU, and nowhere else.

1. torchvision from PyPI is linked against CUDA torch. Its library does not load beside a CPU torch, and its import
   fails while it registers fakes of operators that do not exist. Their schemas are declared first; nothing calls them.
2. The buffer for routed experts is pinned through cudart. Without CUDA there is nothing to pin.
"""

import importlib.abc
import importlib.util
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


_declared: list[Any] = []  # a torch.library.Library takes its operators with it when it is collected


def _declare_torchvision_operators():
    if _declared:
        return
    import torch  # only where torchvision is wanted: this file is run by every Python process of the server

    library = torch.library.Library("torchvision", "DEF")
    for schema in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",):
        library.define(schema)
        library.define(f"q{schema}")
    _declared.append(library)


sys.meta_path.insert(0, _Before())
