"""Weights from a folder are served by a copy of the model before, whatever happens to that one meanwhile."""

from pathlib import Path

import torch
from transformers import AutoConfig

from megatron_rl.server.model_weights import read_weights, without_values


@torch.inference_mode()
def test_a_copy_of_a_model_whose_memory_was_released_computes_as_a_new_one(qwen3: Path) -> None:
    config, cpu, ids = AutoConfig.from_pretrained(qwen3), torch.device("cpu"), torch.tensor([[5, 6, 7]])
    built = read_weights(qwen3, config, torch.float32, cpu).model
    released = without_values(built)
    assert all(value.is_meta for value in released.parameters())
    copied = read_weights(qwen3, config, torch.float32, cpu, like=released).model
    assert torch.equal(copied(ids).logits, built(ids).logits)
    held = {value.data_ptr() for value in built.parameters()}
    assert not held & {value.data_ptr() for value in copied.parameters()}
