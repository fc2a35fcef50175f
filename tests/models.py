"""Small checkpoints for tests, written by transformers itself."""

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM


def make_qwen3(
    folder: Path,
    *,
    tied: bool,
    vocab: int = 259,
    layers: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **sizes: Any,
) -> Path:
    """Random weights, norms included, scaled so that logits differ clearly between tokens. sizes: others than the usual."""
    usual = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    config = Qwen3Config(
        vocab_size=vocab,
        num_hidden_layers=layers,
        **{**usual, **sizes},
        max_position_embeddings=512,
        rope_theta=10000.0,
        tie_word_embeddings=tied,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.08 * noise)
    model.save_pretrained(folder)
    return folder
