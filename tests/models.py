"""Small checkpoints for tests, written by transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM


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
    """Write a Qwen3 folder with random weights and norms, scaled so that logits differ clearly between tokens.

    Args:
        folder: where the model is written; also the return value.
        tied: whether input and output embeddings are tied.
        vocab: size of the vocabulary.
        layers: number of layers.
        dtype: dtype of the stored weights.
        seed: seed of the weights.
        sizes: other keys of the transformers configuration.
    """
    usual = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
    }
    config = Qwen3Config(
        vocab_size=vocab,
        num_hidden_layers=layers,
        **{"max_position_embeddings": 512, **usual, **sizes},
        rope_theta=10000.0,
        tie_word_embeddings=tied,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _save(Qwen3ForCausalLM(config).to(dtype), folder, seed)


def make_qwen3_moe(
    folder: Path,
    *,
    vocab: int = 259,
    layers: int = 4,
    experts: int = 8,
    per_token: int = 2,
    normalized: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **sizes: Any,
) -> Path:
    """Write the same as a mixture of experts.

    Args:
        folder: where the model is written; also the return value.
        vocab: size of the vocabulary.
        layers: number of layers.
        experts: number of experts in every layer.
        per_token: number of experts per token.
        normalized: whether the gates of a token add up to 1.
        dtype: dtype of the stored weights.
        seed: seed of the weights.
        sizes: other keys of the transformers configuration.
    """
    usual = {
        "hidden_size": 64,
        "moe_intermediate_size": 48,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
    }
    ends = {"eos_token_id": 0, "pad_token_id": 0}
    config = Qwen3MoeConfig(
        vocab_size=vocab,
        num_hidden_layers=layers,
        num_experts=experts,
        num_experts_per_tok=per_token,
        norm_topk_prob=normalized,
        intermediate_size=96,
        **{**usual, **ends, **sizes},
        max_position_embeddings=512,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    )
    return _save(Qwen3MoeForCausalLM(config).to(dtype), folder, seed)


def _save(model: PreTrainedModel, folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.08 * noise)
    model.save_pretrained(folder)
    return folder
