"""A layout that does not fit the model is refused before a parameter is allocated."""

from dataclasses import replace

import pytest

from megatron_rl.config import ParallelConfig, make_config
from megatron_rl.errors import ConfigError
from megatron_rl.policy import parallel
from megatron_rl.policy.device_port import pick_device
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.hf_model import check_folder
from tests.models import make_qwen3
from tests.policies import build_planned_chunks


def test_a_rank_without_a_single_token_of_the_vocabulary_is_refused(tmp_path):
    """5 tokens on 4 ranks would be split into 2, 2, 1 and 0."""
    folder = make_qwen3(tmp_path, tied=False, vocab=5, layers=2)
    mesh = replace(parallel.initialize(ParallelConfig(), pick_device("cpu"), seed=0), tp_size=4)
    config = make_config({"model": {"path": str(folder)}, "parallel": {"tensor": 4}})
    shape = check_folder(HFFolder(folder), tensor_parallel=4).shape
    with pytest.raises(ConfigError, match=r"parallel\.tensor = 4 leaves a rank without any of the model's 5 tokens"):
        build_planned_chunks(config, shape, mesh)


def test_stages_that_do_not_divide_the_layers_are_refused(qwen3):
    mesh = parallel.initialize(ParallelConfig(), pick_device("cpu"), seed=0)
    config = make_config({"model": {"path": str(qwen3)}, "parallel": {"pipeline": 3}})
    shape = check_folder(HFFolder(qwen3)).shape
    with pytest.raises(ConfigError, match="= 3 does not divide 4 layers"):
        build_planned_chunks(config, shape, mesh)
