"""All tensors of a value go to the device as one block, and arrive as they were."""

from dataclasses import dataclass
from typing import Any

import torch

from megatron_rl.policy.device_copy import on_device

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Held:
    first: torch.Tensor
    again: torch.Tensor
    more: dict[str, Any]


def test_tensors_of_every_kind_arrive_bit_by_bit_and_share_one_block():
    shared = torch.arange(3, dtype=torch.int32)
    more = {
        "odd": torch.tensor([True, False, True]),
        "floats": (torch.randn(5, 7)[:, ::2], torch.randn(2, dtype=torch.float64), torch.randn(4).bfloat16()),
        "empty": torch.empty(0, 3, dtype=torch.int64),
        "scalar": torch.tensor(1.5),
        "text": "as it is",
        "none": None,
        "list": [1, 2],
    }
    moved = on_device(Held(shared, shared, more), CPU)
    assert moved.first is moved.again and moved.first is not shared
    assert torch.equal(moved.first, shared)
    pairs = [(moved.more[name], more[name]) for name in ("odd", "empty", "scalar")]
    for found, given in [*pairs, *zip(moved.more["floats"], more["floats"], strict=True)]:
        assert found.dtype == given.dtype and torch.equal(found, given)
        assert found.untyped_storage().data_ptr() == moved.first.untyped_storage().data_ptr()
    assert [moved.more[name] for name in ("text", "none", "list")] == ["as it is", None, [1, 2]]


def test_the_block_goes_to_the_device_that_was_asked_for():
    moved = on_device((torch.zeros(3), {"ids": torch.zeros(2, 2, dtype=torch.int64)}), torch.device("meta"))
    assert moved[0].device.type == moved[1]["ids"].device.type == "meta"
    assert moved[1]["ids"].shape == (2, 2) and moved[1]["ids"].dtype == torch.int64
