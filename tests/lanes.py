"""Markers of tests, and the groups of tests that share a lane when several lanes run at the same time.

A lane is a worker of pytest-xdist. Tests that share a server or a group of ranks are in one group, so that it starts
once; other tests are grouped by file. The longest groups start first.
"""

from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parent
# Unit tests that start a process.
_PROCESS = (
    "unit/alp/test_kernels.py",
    "unit/convert/",
    "unit/diagnostics/test_runlog.py",
    "unit/engines/test_fork_server.py",
    "unit/engines/test_patient_transport.py",
    "unit/engines/test_sglang.py",
    "unit/engines/test_sglang_arguments.py",
    "unit/launch/",
    "unit/loggers/test_wandb_logger.py",
    "unit/policy/test_device_port.py",
    "unit/policy/test_garbage.py",
    "unit/protocol/test_payload.py",
    "unit/sandbox/",
    "unit/tasks/test_verifier_benchmark.py",
    "unit/test_cli.py",
    "unit/test_forking.py",
    "unit/test_gpu_benchmark.py",
    "unit/trainer/test_preflight.py",
    "unit/trainer/test_provenance.py",
    "unit/weights/test_model_folder_cases.py",
)
_SHARED = ("contract/", "parallel/")  # one server of each kind, one group of ranks of each size
_ORDER = ("contract/", "parallel/", "e2e/", "unit/", "gpu/")


def _place(item: pytest.Item) -> str:
    """Return the path of the test's file below tests/."""
    return item.path.relative_to(ROOT).as_posix()


def _words(item: pytest.Item) -> list[str]:
    """Return the parameters of a test that are text."""
    parameters = getattr(item, "callspec", None)
    return [] if parameters is None else [value for value in parameters.params.values() if isinstance(value, str)]


def add_markers(item: pytest.Item) -> None:
    """Mark a test by its folder and parameters."""
    place = _place(item)
    for folder, name in (("gpu/", "gpu"), ("parallel/", "parallel"), ("te_cpu/", "parallel"), ("e2e/", "slow")):
        if place.startswith(folder):
            item.add_marker(name)
    if place.startswith(_PROCESS):
        item.add_marker("process")
    elif place.startswith("unit/"):
        item.add_marker("fast")
    if place == "e2e/test_sglang.py" or "sglang" in _words(item):
        item.add_marker("sglang")
        item.add_marker("slow")


def in_lane_order(item: pytest.Item) -> int:
    """Return the sort key of a test: the folders with the longest groups come first."""
    place = _place(item)
    return next(at for at, folder in enumerate((*_ORDER, "")) if place.startswith(folder))


class LaneScheduling(LoadScopeScheduling):
    """Gives whole groups of tests to lanes, in the order in which they were collected."""

    def _split_scope(self, nodeid: str) -> str:
        place = nodeid.partition("::")[0].removeprefix("tests/")
        return next((folder for folder in _SHARED if place.startswith(folder)), place)
