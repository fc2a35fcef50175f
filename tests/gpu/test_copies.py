"""What is copied to a GPU arrives as it was, and is digested there as on a CPU."""

import torch

from megatron_rl.policy.device_copy import on_device
from megatron_rl.weights.digest import device_digests
from tests.gpu.needs import needs_cuda

pytestmark = needs_cuda


def test_a_block_arrives_bit_by_bit_and_nothing_waits_for_it():
    tensors = {"ids": torch.arange(4096), "mask": torch.rand(4096) > 0.5, "empty": torch.empty(0, 3)}
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = on_device(tensors, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, tensor in tensors.items():
        assert moved[name].is_cuda and torch.equal(moved[name].cpu(), tensor)


def test_digests_of_the_gpu_are_those_of_the_cpu():
    generator = torch.Generator().manual_seed(6)
    tensors = [torch.randn(rows, 1001, generator=generator).bfloat16() for rows in (1, 7, 3000)]
    assert device_digests(tensor.cuda() for tensor in tensors) == device_digests(tensors)
