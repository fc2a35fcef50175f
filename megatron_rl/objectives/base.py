"""The frame of every objective: check the inputs, ask the method for per-token losses, aggregate.

An objective is a frozen dataclass in a file of its own. It declares its options as fields, the tensors it
`needs`, its paper's normalisation, and implements `per_token`; nothing else.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.objectives.inputs import LossInputs, LossNorm, NormMode
from megatron_rl.objectives.options import checked, choice, positive, suggest

__all__ = ["LossInputs", "LossNorm", "LossOutputs", "Objective", "TokenLoss", "choice", "positive"]


@dataclass(frozen=True)
class TokenLoss:
    """What a method computes: loss [B, T] differentiable; weight [B, T], the w of -dloss/dlogp = A r w, or None
    where the method has no such form; metrics [B, T] each, averaged over trained tokens."""

    loss: Tensor
    weight: Tensor | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LossOutputs:
    """loss: 0-d, to call backward on. loss_tok, weight_tok [B, T]: per token, before aggregation, 0 where mask is 0.

    metrics: detached 0-d tensors, sums over this micro-batch divided by the *global* token count (`norm.tokens`), so
    that the values of all micro-batches add up to the mean of the batch.
    """

    loss: Tensor
    loss_tok: Tensor
    weight_tok: Tensor | None
    metrics: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """A pure function from LossInputs to LossOutputs. Raises ConfigError for an illegal option when it is built."""

    norm: LossNorm | None = None  # None stands for the paper's; a LossNorm once built

    name: ClassVar[str] = ""
    default_norm: ClassVar[NormMode] = "token_mean"

    @property
    def needs(self) -> frozenset[str]:
        """Names of the optional tensors of LossInputs that must be there; the others need not be computed."""
        return frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", _as_norm(self.norm, self.default_norm))
        for option in fields(self):
            object.__setattr__(self, option.name, checked(self.name, option, getattr(self, option.name)))

    @abstractmethod
    def per_token(self, x: LossInputs) -> TokenLoss:
        """The method. Every tensor of x is [B, T] in one dtype, constants detached, exact zeros where mask is 0."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """Loss of one micro-batch. Raises UserError naming a tensor that is missing or malformed.

        Values (finite numbers, a mask with tokens in it) are checked on CPU tensors; on a GPU that would stall the
        stream, so callers use `LossInputs.validated` where they build the batch.
        """
        norm = inputs.norm or _as_norm(self.norm, self.default_norm)
        inputs = replace(inputs, norm=norm)
        for tensor in sorted(self.needs):
            if getattr(inputs, tensor) is None:
                raise UserError(f"objective {self.name} needs '{tensor}', which is missing from its inputs")
        if inputs.logp.device.type == "cpu":
            inputs.validated()
        else:
            inputs.check_shapes()
        x = inputs.cleaned()
        token = self.per_token(x)
        keep = x.mask.bool()
        loss_tok = torch.where(keep, token.loss, 0.0)
        tokens = x.token_count(norm)
        per_token_share = x.mask / (tokens.clamp(min=1) if isinstance(tokens, Tensor) else tokens)
        return LossOutputs(
            loss=(loss_tok * x.token_weights(norm)).sum(),
            loss_tok=loss_tok,
            weight_tok=None if token.weight is None else torch.where(keep, token.weight, 0.0).detach(),
            metrics={name: (value.detach() * per_token_share).sum() for name, value in token.metrics.items()},
        )


def _as_norm(norm: Any, default: NormMode) -> LossNorm:
    """A LossNorm from what a configuration may hold: a mode, a mapping of its fields, or None for `default`."""
    if norm is None:
        return LossNorm(default)
    if isinstance(norm, LossNorm):
        return norm
    if isinstance(norm, str):
        return LossNorm(norm)  # type: ignore[arg-type]  # checked there
    if isinstance(norm, Mapping):
        known = [f.name for f in fields(LossNorm)]
        for key in norm:
            if key not in known:
                raise ConfigError(f"unknown key 'norm.{key}'; {suggest(key, known)}")
        return LossNorm(**{"mode": default, **norm})
    raise ConfigError(f"norm is {norm!r}; give a mode, a mapping with mode, tokens, sequences, horizon, or a LossNorm")
