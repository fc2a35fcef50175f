"""Architectures that are known and not supported, with the reason."""

from collections.abc import Mapping
from types import MappingProxyType

_GATED_DELTA = "its linear attention (gated delta net) does not take packed sequences in megatron-core 0.16.1"
_SPARSE = "its sparse attention (DSA indexer) has no packed path in megatron-core 0.16.1"
_MAMBA = "its Mamba layers need kernels and a model class that the trainer does not have"
_GEMMA = "its norms multiply by 1 + weight and its scores have soft caps or two RoPE tables: planned"
_WIDE_NORMS = "its norms of queries and keys run over all heads, which tensor parallelism cuts"
_MULTIPLIERS = "it multiplies embeddings, residuals and logits by constants"
_VISION = "the trainer has no vision tower: give the text model, if its authors publish one"

UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "Qwen3NextForCausalLM": _GATED_DELTA,
        "Qwen3_5ForCausalLM": _GATED_DELTA,
        "Qwen3_5MoeForCausalLM": _GATED_DELTA,
        "KimiLinearForCausalLM": _GATED_DELTA,
        "NemotronHForCausalLM": _MAMBA,
        "FalconH1ForCausalLM": _MAMBA,
        "JambaForCausalLM": _MAMBA,
        "DeepseekV2ForCausalLM": "its router scores experts with a softmax and groups by their best expert",
        "DeepseekV32ForCausalLM": _SPARSE,
        "DeepseekV4ForCausalLM": _SPARSE,
        "GlmMoeDsaForCausalLM": _SPARSE,
        "GemmaForCausalLM": _GEMMA,
        "Gemma2ForCausalLM": _GEMMA,
        "Gemma3ForCausalLM": _GEMMA,
        "Gemma4ForCausalLM": "its layers have different widths of heads",
        "MiniMaxM2ForCausalLM": f"{_WIDE_NORMS}: planned",
        "Llama4ForCausalLM": "its layers without RoPE scale queries by their position",
        "Ministral3ForCausalLM": "its queries are scaled by their position",
        "HunYuanDenseV1ForCausalLM": "it normalizes queries and keys after RoPE",
        "HunYuanMoEV1ForCausalLM": "it normalizes queries and keys after RoPE",
        "GraniteForCausalLM": _MULTIPLIERS,
        "GraniteMoeForCausalLM": _MULTIPLIERS,
        "Qwen2MoeForCausalLM": "its shared expert has a gate, which has no rule yet",
        "OlmoeForCausalLM": _WIDE_NORMS,
        "Olmo2ForCausalLM": _WIDE_NORMS,
        "Phi3ForCausalLM": "its fused projections of queries, keys and values have no layout yet",
    }
)


def reason(architecture: str) -> str | None:
    """Return why an architecture is not supported, None if nothing is known about it."""
    known = UNSUPPORTED.get(architecture)
    return _VISION if known is None and architecture.endswith("ForConditionalGeneration") else known
