"""Fixtures shared by all tests: small random Qwen3 checkpoints, and one group of 2 and one of 4 ranks."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests.lanes import LaneScheduling, add_markers, in_lane_order
from tests.models import make_qwen3, make_qwen3_moe
from tests.parallel.group import RANK_VARIABLES, RankGroup


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all tests but those of tests/gpu, which run as a command of their own."""
    if not config.args or not all("tests/gpu" in arg for arg in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_itemcollected(item: pytest.Item) -> None:
    add_markers(item)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LaneScheduling:
    return LaneScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=in_lane_order)


def pytest_collection_finish() -> None:
    """Exempt everything that was imported, half a million objects, from garbage collection."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Undo the exemption: libraries report objects that the interpreter's end does not collect."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def _no_policies_left() -> Iterator[None]:
    """Collect the policies of a file after it: they hold each other, and with them the threads of process groups."""
    yield
    gc.collect()


@pytest.fixture(autouse=True, scope="module")
def _no_rank_variables_left() -> Iterator[None]:
    """Check that a file leaves no RANK or the like behind: what is started later would take itself for a rank."""
    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    yield
    assert {name: os.environ.get(name) for name in RANK_VARIABLES} == before


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 folder with untied embeddings and a vocabulary size that no layout divides."""
    return make_qwen3(tmp_path_factory.mktemp("qwen3"), tied=False)


@pytest.fixture(scope="session")
def qwen3_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with tied embeddings."""
    return make_qwen3(tmp_path_factory.mktemp("qwen3_tied"), tied=True)


@pytest.fixture(scope="session")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE folder: 8 experts in each of 4 layers, 2 per token, with gates that add up to 1."""
    return make_qwen3_moe(tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture(scope="session")
def qwen3_moe_unnormalized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE folder: 3 of 4 experts per token, with gates from a softmax over all experts."""
    return make_qwen3_moe(tmp_path_factory.mktemp("qwen3_moe_unnormalized"), normalized=False, per_token=3, experts=4)


@pytest.fixture(scope="session")
def two_ranks():
    """A group of 2 ranks for all tests."""
    group = RankGroup(2)
    yield group
    group.close()


@pytest.fixture(scope="session")
def four_ranks():
    """A group of 4 ranks for all tests."""
    group = RankGroup(4)
    yield group
    group.close()
