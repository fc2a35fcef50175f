"""Complete small models for runs of seconds: random weights from transformers, and a tokenizer."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_rl.tiny_model import make_tokenizer
from tests.models import make_qwen3_moe
from tests.unit.tasks.char_tokenizer import char_tokenizer

ARITHMETIC = "012+-="


def make_model(folder: Path, tokenizer: PreTrainedTokenizerFast, *, layers: int = 2, seed: int = 0) -> Path:
    """Write a Qwen3 folder with random weights.

    Args:
        folder: where the model is written; also the return value.
        tokenizer: tokenizer of the model; the model has its vocabulary and end token.
        layers: number of layers.
        seed: seed of the weights.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_arithmetic_model(folder: Path) -> Path:
    """Write a model with nine tokens in all, so that random answers to `1+1=` are sometimes right."""
    return make_model(folder, char_tokenizer(ARITHMETIC))


def make_arithmetic_mixture(folder: Path) -> Path:
    """Write the same with four experts in each layer, two per token."""
    tokenizer = char_tokenizer(ARITHMETIC)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    make_qwen3_moe(folder, vocab=len(tokenizer), layers=2, experts=4, **ends)
    tokenizer.save_pretrained(folder)
    return folder


def make_math_model(folder: Path, questions: list[str]) -> Path:
    """Write a model with a byte-level vocabulary trained on the questions, and with a chat template."""
    return make_model(folder, make_tokenizer(questions, 1024))
