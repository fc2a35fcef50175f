"""The base class of every objective. It checks the inputs, calls the method for per-token losses, and aggregates them.

An objective is a frozen dataclass in its own file. It declares its options as fields, the tensors it `needs` and its
paper's normalization, and it implements `per_token`; nothing else.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_rl.errors import ConfigError, UserError, did_you_mean
from megatron_rl.objectives.inputs import OPTIONAL, LossInputs, LossNorm, NormMode
from megatron_rl.objectives.options import checked, choice, nonnegative, positive
from megatron_rl.objectives.score_centering import make_centering

__all__ = ["LossInputs", "LossNorm", "LossOutputs", "Objective", "TokenLoss", "choice", "positive"]

_PER_SEQUENCE = LossNorm("seq_mean_token_mean")


@dataclass(frozen=True)
class TokenLoss:
    """The result of a method's `per_token`.

    Attributes:
        loss: [B, T], differentiable.
        weight: [B, T], the w of -dloss/dlogp = A r w; None if the method has no such form.
        metrics: tensors [B, T], each averaged over trained tokens.
        sequence_metrics: tensors [B, T], each averaged within each sequence and then over sequences.
    """

    loss: Tensor
    weight: Tensor | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    sequence_metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LossOutputs:
    """The loss of one micro-batch and its metrics.

    Attributes:
        loss: 0-d; call backward on it.
        loss_tok: [B, T], the method's own loss per token, before aggregation and without KL and entropy terms; 0 where
            mask is 0.
        weight_tok: [B, T], the method's own weight per token; 0 where mask is 0.
        metrics: detached 0-d tensors. Each is a sum over this micro-batch divided by the *global* count (`norm.tokens`,
            `norm.sequences`), so that the values of all micro-batches add up to the mean of the batch.
    """

    loss: Tensor
    loss_tok: Tensor
    weight_tok: Tensor | None
    metrics: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """A pure function from LossInputs to LossOutputs. The constructor raises ConfigError for an illegal option.

        loss = aggregate(loss_tok) + kl_coef x aggregate(kl to the reference) - entropy_coef x aggregate(entropy)

    The KL and entropy terms are computed, and their tensors are needed, only if their coefficient is not 0.
    `score_centering` adds advantage x drift (objectives/score_centering.py).
    """

    norm: LossNorm | None = None  # None selects the paper's norm; after construction always a LossNorm
    kl_coef: float = nonnegative(0.0, "weight of the KL divergence to the reference policy")
    kl_estimator: str = choice(
        "k3", ("k1", "k2", "k3"), "its estimator, with x = logref - logp: -x, x^2 / 2, exp(x) - x - 1"
    )
    entropy_coef: float = nonnegative(0.0, "weight of the entropy bonus")
    score_centering: Any = field(
        default=None, metadata={"doc": "subtract the drift of the score: {mode, top_k, low, high}"}
    )

    name: ClassVar[str] = ""
    default_norm: ClassVar[NormMode] = "token_mean"
    uses_advantages: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        """Names of the optional tensors of LossInputs that must be given; the others need not be computed.

        A method adds its own tensors: `super().needs | {"logmu"}`.
        """
        terms = frozenset(name for name, coef in (("logref", self.kl_coef), ("entropy", self.entropy_coef)) if coef)
        return terms if self.score_centering is None else terms | self.score_centering.needs

    @property
    def topk(self) -> int:
        """Number of most likely tokens that the engine must report at every position; 0: none."""
        return 0 if self.score_centering is None else int(self.score_centering.top_k)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Name a class that has no name of its own, for messages."""
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", _as_norm(self.norm, self.default_norm))
        for option in fields(self):
            object.__setattr__(self, option.name, checked(self.name, option, getattr(self, option.name)))
        object.__setattr__(self, "score_centering", make_centering(self.score_centering))
        if self.score_centering is not None and not self.uses_advantages:
            raise ConfigError(
                f"objective {self.name} has no advantages, which score_centering multiplies: leave it out"
            )

    @abstractmethod
    def per_token(self, x: LossInputs) -> TokenLoss:
        """Return the per-token loss of the method.

        Every tensor of `x` is [B, T] in one dtype, with constants detached and zeros where mask is 0. The returned
        values where mask is 0 are discarded, but they must be finite. On CPU, `torch.where` and `masked_fill` cost as
        much as 3 to 15 products.
        """

    def check_values(self, x: LossInputs) -> None:  # noqa: B027  most methods take any finite number
        """Raise UserError for values that the method cannot take.

        Called on CPU tensors only; `x` is the same as in `per_token`.
        """

    def summary(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return metrics computed from the means of other metrics over an update, such as a ratio of two."""
        return {}

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """Return the loss of one micro-batch.

        Values (finite numbers, a mask that contains tokens) are checked on CPU tensors only. On a GPU this check would
        stall the stream, so the trainer checks the columns of a batch on the host.

        Raises:
            UserError: a tensor is missing or malformed; the message names it.
        """
        norm = inputs.norm or _as_norm(self.norm, self.default_norm)
        unused = {tensor: None for tensor in OPTIONAL if tensor not in self.needs}
        columns = {name: tensor for name, tensor in inputs.columns.items() if name in self.needs}
        inputs = replace(inputs, norm=norm, columns=columns, **unused)  # type: ignore[arg-type]
        for tensor in sorted(self.needs):
            if inputs.get(tensor) is None:
                raise UserError(f"objective {self.name} needs '{tensor}', which is missing from its inputs")
        if inputs.advantages is None and self.uses_advantages:
            raise UserError(f"objective {self.name} needs 'advantages', which is missing from its inputs")
        if inputs.logp.device.type == "cpu":
            x = inputs.validated().cleaned()
            self.check_values(x)
        else:
            inputs.check_shapes()
            x = inputs.cleaned()
        token = self.per_token(x)
        loss_tok = token.loss * x.mask
        terms, term_metrics = self._terms(x)
        return LossOutputs(
            loss=x.aggregate(loss_tok if terms is None else loss_tok + terms, norm),
            loss_tok=loss_tok,
            weight_tok=None if token.weight is None else token.weight.detach() * x.mask,
            metrics=_averaged(x, norm, {**token.metrics, **term_metrics}, token.sequence_metrics),
        )

    def _terms(self, x: LossInputs) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return the sum of the KL, entropy and centering terms per token (None if all are off) and their metrics."""
        terms: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        if self.kl_coef:
            divergence = _kl(-x.log_ratio("logref"), self.kl_estimator)
            terms.append(self.kl_coef * divergence)
            metrics["kl_ref"] = divergence
        if self.entropy_coef:
            assert x.entropy is not None
            terms.append(-self.entropy_coef * x.entropy)
        if self.score_centering is not None:
            assert x.topk is not None
            centering, found = self.score_centering.term(*x.topk)
            terms.append(x.advantages * centering)
            metrics |= found
        return (sum(terms[1:], terms[0]) if terms else None), metrics


def _kl(x: Tensor, estimator: str) -> Tensor:
    """Return per-token estimates of KL(pi || ref) from tokens of pi; x = logref - logp.

    Reference: J. Schulman, Approximating KL Divergence.
    """
    if estimator == "k1":
        return -x
    if estimator == "k2":
        return x.square() / 2
    return x.exp() - x - 1


def _averaged(
    x: LossInputs, norm: LossNorm, per_token: Mapping[str, Tensor], per_sequence: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    tokens = x.token_count(norm)
    out = {name: _dot(value, x.mask) / tokens for name, value in per_token.items()}
    if per_sequence:
        share = x.token_weights(replace(_PER_SEQUENCE, sequences=norm.sequences))
        out |= {name: _dot(value, share) for name, value in per_sequence.items()}
    return out


def _dot(values: Tensor, weights: Tensor) -> Tensor:
    """Return sum(values x weights) in one pass, without gradient; `values` must broadcast to `weights`."""
    return torch.dot(values.detach().expand_as(weights).reshape(-1), weights.reshape(-1))


def _as_norm(norm: Any, default: NormMode) -> LossNorm:
    """Return a LossNorm from a configuration value: a mode, a mapping of its fields, or None for `default`."""
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
                raise ConfigError(f"unknown key 'norm.{key}'; {did_you_mean(key, known)}")
        return LossNorm(**{"mode": default, **norm})
    raise ConfigError(f"norm is {norm!r}; give a mode, a mapping with mode, tokens, sequences, horizon, or a LossNorm")
