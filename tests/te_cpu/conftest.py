"""A group of two ranks whose layers are Transformer Engine's."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.parallel.group import RankGroup
from tests.te_cpu.port import FOLDER


class TERanks(RankGroup):
    """Two ranks with Transformer Engine's layers. `run` is that of a group with local layers."""

    def run(self, module: str, function: str, timeout: float = 600, **kwargs: Any) -> list[Any]:
        return super().run("tests.te_cpu.port", "run", timeout, target=f"{module}:{function}", **kwargs)


@pytest.fixture(scope="session")
def te_ranks() -> Iterator[TERanks]:
    if not FOLDER.exists():
        pytest.skip(f"needs {FOLDER.name}/ (make te-cpu)")
    group = TERanks(2)
    yield group
    group.close()
