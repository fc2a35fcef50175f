"""The submodules in a spec of megatron-core: a ModuleSpec, or from 0.17 on also a partial of the module's class."""

import dataclasses
import functools
from typing import Any


def parts_of(spec: Any) -> Any:
    """Return the submodules of a spec."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules


def with_parts(spec: Any, **parts: Any) -> Any:
    """Return a spec with some of its submodules replaced."""
    changed = dataclasses.replace(parts_of(spec), **parts)
    if isinstance(spec, functools.partial):
        return functools.partial(spec.func, *spec.args, **{**spec.keywords, "submodules": changed})
    return dataclasses.replace(spec, submodules=changed)
