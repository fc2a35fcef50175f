"""Recording of the experts that the embedded engine's model chooses, from the outputs of its routers."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

ROUTED = ("qwen3_moe",)  # model types whose routers return (logits, gates, chosen experts)


def has_experts(config: PreTrainedConfig) -> bool:
    """Return whether `record_experts` supports the model's routers."""
    return config.model_type in ROUTED


@contextmanager
def record_experts(model: nn.Module, wanted: bool) -> Iterator["RoutingRecorder"]:
    """Record the experts of one forward pass inside the context. This costs nothing if they are not wanted."""
    choices = RoutingRecorder()
    body: Any = model
    routers = [layer.mlp.gate for layer in body.model.layers] if wanted else []
    hooks = [router.register_forward_hook(choices.note) for router in routers]
    try:
        yield choices
    finally:
        for hook in hooks:
            hook.remove()


class RoutingRecorder:
    """Experts chosen in one forward pass, layer after layer."""

    def __init__(self) -> None:
        self._layers: list[torch.Tensor] = []

    def note(self, router: nn.Module, args: Any, out: tuple[torch.Tensor, ...]) -> None:
        """Record the experts that one router chose. This is its forward hook.

        Args:
            router: not used.
            args: not used.
            out: the router's outputs: logits, gates and the chosen experts.
        """
        self._layers.append(out[2])

    def of(self, rows: int) -> np.ndarray | None:
        """Return the chosen experts, [rows, tokens, L, K] int16, or None if none were wanted."""
        if not self._layers:
            return None
        stacked = torch.stack(self._layers, 1)
        return stacked.view(rows, -1, *stacked.shape[1:]).to("cpu", torch.int16).numpy()


def encode_routing(routing_TLK: np.ndarray) -> str:
    """Encode the experts as SGLang sends them: int32 in base64."""
    return base64.b64encode(np.ascontiguousarray(routing_TLK, dtype=np.int32).tobytes()).decode("ascii")
