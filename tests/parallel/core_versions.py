"""Ranks with the newest megatron-core that is allowed, beside ranks with the oldest: `make newest-core` installs it."""

import importlib
import sys
from pathlib import Path
from typing import Any

from tests.parallel.group import RankGroup

FOLDER = Path(__file__).parents[2] / ".mcore-newest"


class OldestRanks(RankGroup):
    """Ranks with the megatron-core of the environment, whatever PYTHONPATH says. `run` is that of `RankGroup`."""

    def run(self, module: str, function: str, timeout: float = 600, **kwargs: Any) -> list[Any]:
        return super().run(
            "tests.parallel.core_versions", "run_on_oldest", timeout, target=f"{module}:{function}", **kwargs
        )


def run_on_oldest(target: str, **kwargs: Any) -> Any:
    """Call `module:function` without the folder of the newest megatron-core. Nothing of it may be imported before."""
    sys.path[:] = [place for place in sys.path if Path(place) != FOLDER]
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)(**kwargs)


def version() -> str:
    """Return megatron-core's version in this process."""
    return str(importlib.import_module("megatron.core").__version__)
