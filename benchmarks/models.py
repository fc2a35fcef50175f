"""Qwen3 models of any size with random weights, for benchmarks."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_rl.config import Config
from megatron_rl.plan import resolve_run
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.build import build_policy
from megatron_rl.policy.model import PolicyModel, build_chunks
from megatron_rl.policy.parallel import Mesh
from megatron_rl.weights.families import ModelShape


def make_qwen3(
    folder: Path,
    *,
    hidden: int,
    layers: int,
    vocab: int,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    **sizes: Any,
) -> Path:
    """Write a Qwen3 folder with random weights and a tokenizer.

    Args:
        folder: where the model is written; also the return value.
        hidden: width of the hidden states.
        layers: number of layers.
        vocab: size of the vocabulary.
        tied: whether input and output embeddings are tied.
        dtype: dtype of the stored weights.
        sizes: other keys of the transformers configuration.
    """
    heads = {"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 64, "head_dim": 32}
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        tie_word_embeddings=tied,
        eos_token_id=0,
        **{"max_position_embeddings": 4096, **heads, **sizes},
    )
    Qwen3ForCausalLM(config).to(dtype).save_pretrained(folder)
    write_tokenizer(folder, vocab)
    return folder


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Write a tokenizer of words without meaning.

    SGLang's first request to itself is text. Without a tokenizer, it would have no tokens.
    """
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w0").save_pretrained(folder)


def build_planned_policy(config: Config, mesh: Mesh) -> Policy:
    """Return the policy of a configuration, with the plan that belongs to it. Collective."""
    plan = resolve_run(config)
    return build_policy(config, mesh, plan.precision, plan.noise)


def build_planned_chunks(config: Config, shape: ModelShape, mesh: Mesh) -> list[PolicyModel]:
    """Return the model chunks of a configuration, parameters unset. Collective."""
    plan = resolve_run(config)
    return build_chunks(config, shape, mesh, plan.precision, plan.noise)
