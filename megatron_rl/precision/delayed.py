"""Delayed scaling: the scales of a pass come from the magnitudes (amax) of previous passes.

All ranks of a group use the same scales. The rules are those of Transformer Engine under megatron-core's defaults
(history 1, most recent). The scales of inputs and weights are updated at the end of every forward pass of a block,
those of gradients at the end of every backward pass. The first pass uses scale 1 everywhere, so small gradients are
lost until their magnitudes are known.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.precision.formats import DelayedScale, amax
from megatron_rl.precision.products import Operands, Scales


class LinearScales:
    """The three delayed scales of one linear layer.

    It also stores the scales that checkpointed forward passes used, so that their recomputation uses the same ones.
    """

    def __init__(self, operands: Operands, device: torch.device) -> None:
        self.inputs = DelayedScale(operands.inputs.max, device=device)
        self.weights = DelayedScale(operands.weights.max, device=device)
        self.gradients = DelayedScale(operands.gradients.max, device=device)
        self.open = False  # True during the forward pass of an update
        self._checkpointed: deque[Scales] = deque()

    def forward(self, x: Tensor, weight: Tensor) -> Scales:
        """Return the scales of this product. Magnitudes are recorded only in the forward pass of an update.

        Activation recomputation runs during backward, when later micro-batches may already have updated the scales. It
        therefore gets the scales of its own first pass (micro-batches are recomputed in the order of their forward
        passes), and its magnitudes are not recorded again.
        """
        scales = Scales(self.inputs.scale, self.weights.scale)
        if self.open:
            self.inputs.observe(amax(x.detach()))
            self.weights.observe(amax(weight.detach()))
            if not torch.is_grad_enabled():
                self._checkpointed.append(scales)
        elif torch.is_grad_enabled():
            return self._checkpointed.popleft()
        return scales

    def backward(self, grad: Tensor) -> Tensor:
        """Record the magnitude of this gradient and return its scale."""
        self.gradients.observe(amax(grad))
        return self.gradients.scale

    def tensors(self) -> list[Tensor]:
        """Return the fp32 tensors that determine the next passes: scale and history of every operand.

        These are the live tensors, not copies. The caller copies them, and may write to them in place between updates.
        """
        return [
            tensor for scale in (self.inputs, self.weights, self.gradients) for tensor in (scale.scale, scale.history)
        ]

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {name: getattr(self, name).state_dict() for name in ("inputs", "weights", "gradients")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("inputs", "weights", "gradients"):
            getattr(self, name).load_state_dict(state[name])


class DelayedScaleHooks:
    """Hooks that update the scales of a block's linears at the end of its forward and of its backward passes."""

    def __init__(self, block: torch.nn.Module, linears: Sequence[LinearScales], group: dist.ProcessGroup) -> None:
        """Register the forward hooks on the block.

        Args:
            block: a megatron-core TransformerBlock.
            linears: the scales of the linears in the block.
            group: the ranks that share scales: they use the largest magnitude on any of them.
        """
        self.linears, self.group = linears, group
        block.register_forward_pre_hook(self._begin, with_kwargs=True)
        block.register_forward_hook(self._end)

    def _begin(self, block: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        for linear in self.linears:
            linear.open = True
        hidden = kwargs["hidden_states"] if block.pre_process else block.input_tensor
        # The gradient of a block's input is the last one that its backward pass computes.
        hidden.register_hook(self._backward_done)

    def _end(self, block: Any, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        for linear in self.linears:
            linear.open = False
        self._update([scale for linear in self.linears for scale in (linear.inputs, linear.weights)])

    def _backward_done(self, _: Tensor) -> None:
        self._update([linear.gradients for linear in self.linears])

    def _update(self, scales: list[DelayedScale]) -> None:
        newest = torch.stack([scale.newest for scale in scales])
        dist.all_reduce(newest, op=dist.ReduceOp.MAX, group=self.group)
        for scale, value in zip(scales, newest, strict=True):
            scale.newest.copy_(value)
            scale.update()
