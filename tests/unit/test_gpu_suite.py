"""The command of the GPU tests runs all of them in order, and none after its budget."""

from pathlib import Path

import megatron.core
import pytest
import torch

from megatron_rl.doctor import describe_machine
from tests.gpu.run import ORDER, Recorder


def test_every_file_of_gpu_tests_is_run_once():
    files = {path.name for path in (Path(__file__).parents[1] / "gpu").glob("test_*.py")}
    assert set(ORDER) == files and len(ORDER) == len(files)


def test_no_test_begins_after_the_budget():
    Recorder(60).pytest_runtest_setup(None)
    with pytest.raises(pytest.skip.Exception, match="budget is used up"):
        Recorder(-1).pytest_runtest_setup(None)


def test_the_result_names_the_versions_that_computed_it():
    found = describe_machine()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["megatron-core"] == megatron.core.__version__
