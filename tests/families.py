"""One tiny random model for each kind of architecture that is supported, written by transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "vocab_size": 259,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48, "num_experts": 8, "norm_topk_prob": True}
OSS_YARN = {**YARN, "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 64, "truncate": False}

# name -> (model type, keys of its configuration)
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 8}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "glm4": ("glm4", {"attention_bias": True}),
    "qwen3_yarn": ("qwen3", {"rope_parameters": YARN}),
    "qwen3_linear": ("qwen3", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "qwen3_dynamic": ("qwen3", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
}
SIGMOID = {"n_routed_experts": 8, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "num_experts_per_tok": 2}
LATENT = {
    **SIGMOID,
    "num_key_value_heads": 8,
    "head_dim": 8,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
}
GROUPED = {"q_lora_rank": 24, "n_group": 4, "topk_group": 2}
UNGROUPED = {"n_group": 1, "topk_group": 1}
YARN_MSCALE = {**YARN, "factor": 40.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe_dense_layer": ("qwen3_moe", {**EXPERTS, "mlp_only_layers": [0], "head_dim": 16}),
    "glm4_moe": ("glm4_moe", {**SIGMOID, "use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 2.5}),
    "gpt_oss": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "rope_parameters": OSS_YARN},
    ),
    "deepseek_v3": ("deepseek_v3", {**LATENT, **GROUPED, "rope_parameters": YARN_MSCALE}),
    "moonlight": ("deepseek_v3", {**LATENT, **UNGROUPED, "q_lora_rank": None, "rms_norm_eps": 1e-3}),
    "glm4_moe_lite": ("glm4_moe_lite", {**LATENT, "q_lora_rank": 24, "num_experts_per_tok": 2}),
}
FAMILIES_AT_TOY_SIZE = DENSE | MIXTURES


def make_family(folder: Path, name: str, *, seed: int = 0, original_format: bool = True, **keys: Any) -> Path:
    """Write the model `name` of the table, with every parameter and buffer random.

    Parameters that are 0 or 1 at the start (norms, biases, sinks) would hide a missing mapping.

    Args:
        folder: where the model is written; also the return value.
        name: name in `FAMILIES_AT_TOY_SIZE`.
        seed: seed of the weights.
        original_format: write one tensor per expert, as released models have them; False: as transformers keeps them.
        keys: further keys of the configuration.
    """
    kind, own = FAMILIES_AT_TOY_SIZE[name]
    config = CONFIG_MAPPING[kind](**{**SIZES, **own, **keys})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed)
    model.save_pretrained(folder, save_original_format=original_format)
    return folder


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Make every parameter, and every buffer that holds learned values, random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else noise if "sinks" in name else 0.08 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
