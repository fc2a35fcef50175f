"""Every rank and every engine has GPUs of its own, or the run is refused before anything starts."""

import pytest

from megatron_rl.config import Config, make_config
from megatron_rl.errors import ConfigError
from megatron_rl.plan.placement import Placement, place, ranks_here
from megatron_rl.policy.device_port import gpu_of_rank
from megatron_rl.policy.parallel import refuse_shared_gpus, variables_of_trainer
from megatron_rl.precision.machine import Machine
from megatron_rl.quickstart import hides_gpus


def gpus(count: int) -> Machine:
    """Return a machine with this number of GPUs."""
    return Machine((9, 0), (13, 0), transformer_engine=True, gpus=count)


def config(data: int = 1, **rollout: object) -> Config:
    """Return a configuration of `data` ranks with SGLang engines."""
    return make_config({"model": {"path": "m"}, "parallel": {"data": data}, "rollout": {"engine": "sglang", **rollout}})


def test_engines_follow_the_ranks():
    placed = place(config(2, servers=2, sglang={"tensor": 2}), gpus(8), 2)
    assert placed == Placement((0, 1), ((2, 3), (4, 5)))
    assert str(placed) == "ranks on GPUs 0-1; engines on GPUs 2-3, 4-5" and placed.first_gpu == 2


def test_engines_start_where_the_key_says():
    assert place(config(1, sglang={"first_gpu": 5}), gpus(8), 1).engines == ((5,),)


def test_a_gpu_that_ranks_and_engines_share_counts_once():
    assert place(config(2, servers=2, sglang={"tensor": 2}), gpus(8), 2).engine_gpus == 4
    shared = config(2, colocate=True, transport="tensor", servers=3)
    assert place(shared, gpus(8), 2).engine_gpus == 1


def test_an_evaluation_has_no_ranks_so_one_gpu_is_enough():
    assert place(config(), gpus(1), 0) == Placement((), ((0,),))


def test_nothing_is_placed_where_nothing_uses_a_gpu():
    assert place(config(64, servers=9), Machine(), 64) == Placement()
    embedded = make_config({"model": {"path": "m"}})
    for machine, expected in ((Machine(), Placement()), (gpus(1), Placement((0,)))):
        assert place(embedded, machine, 1) == expected
    assert place(config(urls=["http://a"]), gpus(1), 1) == Placement((0,))


@pytest.mark.parametrize(
    ("asked", "count", "words"),
    [
        (config(2), 1, r"2 ranks on this machine need a GPU each, and torch sees 1 GPU: .*CUDA_VISIBLE_DEVICES="),
        (config(1), 1, r"1 servers x sglang.tensor 1 from GPU 1 on .* number 1, and torch sees 1 GPU, 1 of them"),
        (config(4, servers=5), 8, r"5 servers x sglang.tensor 1 from GPU 4 on need GPUs up to number 8.*8 GPUs"),
        (config(2, sglang={"first_gpu": 0}), 8, r"first_gpu is 0, .*ranks .* GPUs 0-1: set it to 2 .*colocate"),
        (config(2, sglang={"first_gpu": 1}), 8, r"first_gpu is 1"),
        (config(2, sglang={"tensor": 4, "first_gpu": 5}), 8, r"number 8"),
    ],
    ids=["ranks", "one GPU", "servers", "on rank 0", "on rank 1", "wide"],
)
def test_what_does_not_fit_is_refused_by_its_key(asked: Config, count: int, words: str):
    with pytest.raises(ConfigError, match=words):
        place(asked, gpus(count), asked.parallel.world_size)


def test_colocated_engines_share_the_gpus_of_the_ranks():
    assert place(config(2, servers=2, colocate=True), gpus(2), 2) == Placement((0, 1), ((0,), (1,)))


def test_ranks_are_counted_where_they_share_gpus():
    asked = config(8)
    assert ranks_here(asked, gpus(8), {}) == 8  # the local launcher starts them all
    assert ranks_here(asked, gpus(4), {"RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}) == 4
    assert ranks_here(asked, gpus(4), {"RANK": "5", "LOCAL_RANK": "2"}) == 3  # at least those up to this one
    assert ranks_here(asked, gpus(1), {"RANK": "5", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}) == 1  # its own GPU


def test_a_rank_without_a_gpu_is_refused():
    assert [gpu_of_rank(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert gpu_of_rank(3, 1) == 0  # the launcher shows it this one alone
    with pytest.raises(ConfigError, match=r"LOCAL_RANK is 2, and torch sees 2 GPUs"):
        gpu_of_rank(2, 2)


def test_two_ranks_on_one_gpu_are_refused_by_number_on_every_rank():
    refuse_shared_gpus(["a of host0", "b of host0", "a of host1"])
    with pytest.raises(ConfigError, match="ranks 1 and 3 are both on GPU b of host0") as refused:
        refuse_shared_gpus(["a of host0", "b of host0", "a of host1", "b of host0"])
    assert refused.value.everywhere


def test_the_quickstart_hides_gpus_that_are_too_few_for_its_ranks():
    assert [hides_gpus(count, 2) for count in (0, 1, 2, 8)] == [False, True, False, False]


def test_cuda_and_nccl_find_the_environment_that_the_configuration_needs():
    plain = {"model": {"path": "m"}}
    assert variables_of_trainer(make_config(plain)) == {}
    asked = {"parallel": {"tensor": 2}, "rollout": {"transport": "distributed"}}
    expected = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_CUMEM_ENABLE": "0"}
    assert variables_of_trainer(make_config(plain | asked)) == expected
