"""The table of objectives that the tests of every objective run over, and the inputs of these tests."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.objectives import LossInputs, Objective, make_objective

MODES = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]
TENSORS = ["logp", "logmu", "logold", "logref", "entropy", "staleness"]  # [B, T] each
HORIZON = 9  # fixed response length, set wherever tensors are packed or split


@dataclass(frozen=True)
class Spec:
    """One row of the table.

    Attributes:
        id: name of the row in the test ids.
        options: the argument of `make_objective`.
        advantages: False if the method uses rewards instead or adds a penalty, so that advantages of 0 do not mean a
            loss of 0.
        weight: False if -dloss/dlogp has no form A r w.
    """

    id: str
    options: dict[str, Any]
    advantages: bool = True
    weight: bool = True

    def make(self, **more: Any) -> Objective:
        return make_objective({**self.options, **more})


def _spec(id: str, **options: Any) -> Spec:
    return Spec(id, {"name": id, **options})


_MASKS = [
    {"name": "mis", "weight": False, "level": "sequence"},
    {"name": "geo_mask", "low": 0.7, "high": 1.4},
    {"name": "stale_mask", "max_staleness": 1},
]
_WEIGHTS = [{"name": "tis", "level": "sequence"}, {"name": "icepop", "low": 0.6, "high": 1.8}]

RATIO_SPECS = [
    _spec("ppo"),
    _spec("grpo", dual_clip=3.0),
    _spec("dapo"),
    _spec("gspo", clip_low=0.1, clip_high=0.1),
    _spec("cispo", clip_high=0.5),
    _spec("sapo"),
    _spec("simple_po"),
    _spec("minirl", truncation=1.5),
    _spec("dppo_tv", delta=0.1),
    _spec("dppo_kl"),
    _spec("dppo_topk", divergence="kl", top_k=3),
    _spec("drpo", delta=0.15),
    _spec("cppo", delta=0.1, delta_b=0.01),
    Spec("opd", {"name": "opd"}, advantages=False, weight=False),
    Spec("opd-weighted", {"name": "opd", "corrections": _WEIGHTS}, advantages=False, weight=False),
    Spec("cppo-penalty", {"name": "cppo", "log_ratio_coef": 0.3}, advantages=False),
    Spec(
        "ppo-sequence", {"name": "ppo", "ratio_level": "sequence", "clip_low": 0.5, "clip_high": 3.0, "dual_clip": 3.0}
    ),
    Spec("ppo-geometric", {"name": "ppo", "ratio_level": "geometric"}),
    Spec("ppo-cumulative", {"name": "ppo", "ratio_level": "cumulative", "clip_low": 0.5, "clip_high": 3.0}),
    Spec("dppo_tv-trainer_old", {"name": "dppo_tv", "ratio_denominator": "trainer_old", "delta_low": 0.05}),
    Spec("minirl-rollout", {"name": "minirl", "ratio_denominator": "rollout"}),
    Spec("drpo-centered", {"name": "drpo", "score_centering": {"mode": "tis", "top_k": 3}}),
    Spec("drpo-masked", {"name": "drpo", "corrections": _MASKS}),
    Spec("grpo-weighted", {"name": "grpo", "corrections": _WEIGHTS}),
]

OTHER_SPECS = [
    Spec("naive", {"name": "naive"}, weight=False),
    Spec("scaled_po", {"name": "scaled_po"}, weight=False),
    Spec("asympo", {"name": "asympo"}, weight=False),
    Spec("asympo-bounded", {"name": "asympo", "p_low": 0.1, "p_high": 0.9}, weight=False),
    Spec("erpd_mse", {"name": "erpd_mse", "negative_weight": 0.5}, advantages=False, weight=False),
    Spec("erpd_ce", {"name": "erpd_ce", "beta": 0.05}, advantages=False, weight=False),
    Spec("erpd_ce-mean", {"name": "erpd_ce", "beta": 0.05, "reduction": "mean"}, advantages=False, weight=False),
    _spec("erpd_distill"),
]

SPECS = [*RATIO_SPECS, *OTHER_SPECS]

every_objective = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch(seed: int, lengths: list[int], top_k: int = 3, vocabulary: int = 6) -> LossInputs:
    """Return right-padded float64 inputs with every tensor.

    Args:
        seed: seed of the random values.
        lengths: trained tokens of each row; some rows may have none.
        top_k: number of top-K tokens.
        vocabulary: vocabulary size.
    """
    g = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max([*lengths, 1]))

    def normal(*more: int) -> Tensor:
        return torch.randn((*shape, *more), generator=g, dtype=torch.float64)

    logp = -3 * torch.rand(shape, generator=g, dtype=torch.float64)
    logits_V = normal(vocabulary)
    logmu_K, ids_K = logits_V.log_softmax(-1).topk(top_k)
    return LossInputs(
        logp=logp,
        logmu=(logp + 0.5 * normal()).clamp(max=-1e-3),
        logold=(logp + 0.5 * normal()).clamp(max=-1e-3),
        logref=(logp + 0.5 * normal()).clamp(max=-1e-3),
        entropy=normal().abs(),
        staleness=torch.randint(3, shape, generator=g).double(),
        advantages=torch.randn(len(lengths), generator=g, dtype=torch.float64),
        rewards=torch.randint(2, (len(lengths),), generator=g).double(),
        topk=((logits_V + 0.5 * normal(vocabulary)).log_softmax(-1).gather(-1, ids_K), logmu_K),
        mask=(torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).double(),
    )


def only_needed(objective: Objective, x: LossInputs) -> LossInputs:
    """Return `x` without the tensors that the objective does not need."""
    return replace(x, **{name: None for name in (*TENSORS[1:], "rewards", "topk") if name not in objective.needs})


def mapped(x: LossInputs, change) -> LossInputs:
    """Return `x` with `change(name, tensor)` in place of every tensor that is not None.

    Both tensors of topk have the name "topk".
    """
    tensors = {name: getattr(x, name) for name in (*TENSORS, "advantages", "mask", "rewards", "seq_ids")}
    changed = {name: change(name, tensor) for name, tensor in tensors.items() if tensor is not None}
    if x.topk is not None:
        changed["topk"] = (change("topk", x.topk[0]), change("topk", x.topk[1]))
    return replace(x, **changed)


def packed(x: LossInputs, source: Tensor, ids: list[int], padding: int) -> LossInputs:
    """Return the tokens at `source` in one packed row, with nan on the padding of every tensor except the mask.

    Args:
        x: right-padded inputs.
        source: positions in the flat padded tensor.
        ids: sequence id of each row of `x`.
        padding: number of padding tokens.
    """
    width = x.mask.shape[1]

    def row(name: str, tensor: Tensor) -> Tensor:
        per_token = tensor if tensor.shape[:2] == x.mask.shape else tensor[:, None].expand_as(x.mask)
        out = per_token.flatten(0, 1)[source]
        return torch.cat([out, out.new_full((padding, *out.shape[1:]), 0.0 if name == "mask" else float("nan"))])[None]

    seq_ids = torch.tensor([[ids[s // width] for s in source.tolist()] + [-1] * padding])
    return replace(mapped(x, row), seq_ids=seq_ids)


def trained(x: LossInputs, order: list[int]) -> Tensor:
    """Return the positions of the trained tokens in the flat padded tensor, row by row in the given order."""
    return torch.cat([(x.mask[row] > 0).nonzero()[:, 0] + row * x.mask.shape[1] for row in order])


def gradient(objective: Objective, x: LossInputs) -> tuple[float, Tensor]:
    """Return the loss, and its gradient in logp and entropy, [B, T, 2]."""
    logp = x.logp.clone().requires_grad_()
    entropy = torch.zeros_like(logp) if x.entropy is None else x.entropy.clone()
    entropy.requires_grad_()
    loss = objective(replace(x, logp=logp, entropy=None if x.entropy is None else entropy)).loss
    grads = torch.autograd.grad(loss, [logp, entropy], allow_unused=True)
    return loss.item(), torch.stack([torch.zeros_like(logp) if grad is None else grad for grad in grads], dim=-1)


# Six tokens. The worked values of three policies are known to six digits.
MU = [[0.5, 0.5, 0.01, 0.9], [0.2, 0.02, 0.3, 0.3]]
PI = [[0.6, 0.4, 0.03, 0.6], [0.45, 0.30, 0.3, 0.3]]
ADVANTAGES = [[1, 1, 0.5, -1], [-0.5, 2, 1, 1]]
MASK = [[1, 1, 1, 1], [1, 1, 0, 0]]


def worked_inputs(logp: Tensor | None = None, **more: Any) -> LossInputs:
    return LossInputs(f64(PI).log() if logp is None else logp, f64(MU).log(), f64(ADVANTAGES), f64(MASK), **more)


def one_token(options: dict[str, Any], pi: float, mu: float, a: float, **more: float) -> tuple[float, float, float]:
    """Return loss, weight and dloss/dlogp of a single token.

    Args:
        options: the argument of `make_objective`.
        pi: probability under the current policy.
        mu: probability under the behavior policy.
        a: advantage.
        **more: probabilities under other policies, such as logold.
    """
    logp = f64([[pi]]).log().requires_grad_()
    others = {name: f64([[value]]).log() for name, value in more.items()}
    out = make_objective(options)(LossInputs(logp, f64([[mu]]).log(), f64([a]), f64([[1]]), **others))
    out.loss_tok.sum().backward()
    assert out.weight_tok is not None and logp.grad is not None
    return out.loss_tok.item(), out.weight_tok.item(), logp.grad.item()
