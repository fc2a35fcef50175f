"""Functions that score tokens over a vocabulary split by tensor parallelism, and the same in float64."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_rl.config import ParallelConfig
from megatron_rl.policy import parallel
from megatron_rl.policy.device_port import pick_device
from megatron_rl.policy.logprobs import token_scores
from megatron_rl.weights.layouts import padded_vocab


@dataclass(frozen=True)
class Case:
    """T hidden states of width H, an output projection of V rows, the scored rows and the gradients of scores."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    rows: Tensor  # [R]
    labels: Tensor  # [R]
    topk: Tensor  # [R, K], further tokens to score
    grad_logp: Tensor  # [R]
    grad_entropy: Tensor  # [R]
    grad_topk: Tensor  # [R, K]

    @staticmethod
    def make(vocab: int = 259, tokens: int = 48, width: int = 24, seed: int = 3) -> "Case":
        g = torch.Generator().manual_seed(seed)
        rows = torch.randperm(tokens, generator=g)[: 3 * tokens // 4].sort().values
        labels = torch.randint(0, vocab, (len(rows),), generator=g)
        labels[0], labels[-1] = 0, vocab - 1
        topk = torch.randint(0, vocab, (len(rows), 5), generator=torch.Generator().manual_seed(seed))
        topk[0, 0], topk[-1, -1] = 0, vocab - 1
        return Case(
            hidden=torch.randn(tokens, width, generator=g),
            weight=torch.randn(vocab, width, generator=g) * 0.6,  # logits of about +-3
            rows=rows,
            labels=labels,
            topk=topk,
            grad_logp=torch.randn(len(rows), generator=g),
            grad_entropy=torch.randn(len(rows), generator=g),
            grad_topk=torch.randn(len(rows), 5, generator=g),
        )

    def to(self, device: torch.device) -> "Case":
        """Return the same case on a device."""
        return Case(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def reference(
        self, temperature: float, *, logp: bool = True, entropy: bool = True, topk: bool = False
    ) -> dict[str, np.ndarray]:
        """Return torch.log_softmax over all logits in float64, and its autograd gradients.

        Args:
            temperature: the logits are divided by it.
            logp: include log-probabilities in the differentiated value.
            entropy: include entropies in the differentiated value.
            topk: include the log-probabilities of the further tokens.
        """
        hidden, weight = (t.double().requires_grad_() for t in (self.hidden, self.weight))
        scores_RV = torch.log_softmax(hidden[self.rows] @ weight.T / temperature, -1)
        logp_R = scores_RV.gather(-1, self.labels[:, None])[:, 0]
        entropy_R = -(scores_RV.exp() * scores_RV).sum(-1)
        topk_RK = scores_RV.gather(-1, self.topk)
        value = (logp_R * self.grad_logp).sum() * logp + (entropy_R * self.grad_entropy).sum() * entropy
        value = value + (topk_RK * self.grad_topk).sum() * topk
        value.backward()
        assert hidden.grad is not None and weight.grad is not None
        return {
            "logp": logp_R.detach().numpy(),
            "entropy": entropy_R.detach().numpy(),
            "topk": topk_RK.detach().numpy(),
            "d_hidden": hidden.grad.numpy(),
            "d_weight": weight.grad.numpy(),
        }


def scores(
    layout: dict[str, Any], vocab: int, temperature: float, chunk_bytes: int, kept_bytes: int
) -> dict[str, np.ndarray]:
    """Return scores and gradients from the policy's head on every rank. d_hidden and d_weight are of whole tensors.

    Args:
        layout: the `parallel` section.
        vocab: size of the vocabulary.
        temperature: the logits are divided by it.
        chunk_bytes: as in `token_scores`.
        kept_bytes: as in `token_scores`.
    """
    config = ParallelConfig(**layout)
    mesh = parallel.initialize(config, pick_device("cpu"), seed=0)
    group = parallel_state.get_tensor_model_parallel_group()
    case = Case.make(vocab)
    size = padded_vocab(vocab, mesh.tp_size) // mesh.tp_size
    # Rows that pad the vocabulary must have no effect, so their values are large.
    padded = torch.full((size * mesh.tp_size, case.weight.shape[1]), 50.0)
    padded[:vocab] = case.weight
    weight = padded[mesh.tp_rank * size : (mesh.tp_rank + 1) * size].clone().requires_grad_()
    if config.sequence:
        leaf = case.hidden.chunk(mesh.tp_size)[mesh.tp_rank].clone().requires_grad_()
        hidden = gather_from_sequence_parallel_region(leaf, tensor_parallel_output_grad=True, group=group)
    else:
        leaf = case.hidden.clone().requires_grad_()
        hidden = copy_to_tensor_model_parallel_region(leaf, group=group)
    logp, entropy, topk = token_scores(
        hidden[case.rows],
        weight,
        case.labels,
        temperature=temperature,
        vocab_size=vocab,
        group=group,
        chunk_bytes=chunk_bytes,
        kept_bytes=kept_bytes,
        topk_labels_RK=case.topk,
    )
    torch.autograd.backward([logp, entropy, topk], [case.grad_logp, case.grad_entropy, case.grad_topk])
    assert leaf.grad is not None and weight.grad is not None
    d_weight = _whole(weight.grad, group)
    assert not d_weight[vocab:].any(), "rows that pad the vocabulary got a gradient"
    return {
        "logp": logp.detach().numpy(),
        "entropy": entropy.detach().numpy(),
        "topk": topk.detach().numpy(),
        "d_hidden": (_whole(leaf.grad, group) if config.sequence else leaf.grad).numpy(),
        "d_weight": d_weight[:vocab].numpy(),
    }


def _whole(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)
