"""Delayed scaling: scales of a pass from the magnitudes of passes before it, agreed on by the ranks of a group.

As Transformer Engine does it under megatron-core's defaults (history 1, most recent): the scales of inputs and weights
move on at the end of every forward pass of a block, those of gradients at the end of every backward pass. The first
pass has scale 1 everywhere, which loses small gradients until magnitudes are known.
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
    """The three scales of one linear, and those that checkpointed forward passes used, for their recomputation."""

    def __init__(self, operands: Operands, device: torch.device) -> None:
        self.inputs = DelayedScale(operands.inputs.max, device=device)
        self.weights = DelayedScale(operands.weights.max, device=device)
        self.gradients = DelayedScale(operands.gradients.max, device=device)
        self.open = False  # inside the forward pass of an update
        self._checkpointed: deque[Scales] = deque()

    def forward(self, x: Tensor, weight: Tensor) -> Scales:
        """The scales of this product; magnitudes are noted in the forward pass of an update alone.

        A recomputation happens in backward, when other micro-batches may have moved the scales on: it gets those of its
        own first pass (micro-batches come back in the order they went), and is not noted again.
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
        """The scale of this gradient, whose magnitude is noted."""
        self.gradients.observe(amax(grad))
        return self.gradients.scale

    def tensors(self) -> list[Tensor]:
        """All that decides over coming passes, fp32, as it is held: to be copied, and written in place between updates."""
        return [
            tensor for scale in (self.inputs, self.weights, self.gradients) for tensor in (scale.scale, scale.history)
        ]

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {name: getattr(self, name).state_dict() for name in ("inputs", "weights", "gradients")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("inputs", "weights", "gradients"):
            getattr(self, name).load_state_dict(state[name])


class DelayedUpdates:
    """Moves the scales of a block's linears on, at the end of its forward and of its backward passes.

    block: a megatron-core TransformerBlock. group: the ranks that agree, by the largest magnitude any of them saw.
    """

    def __init__(self, block: torch.nn.Module, linears: Sequence[LinearScales], group: dist.ProcessGroup) -> None:
        self.linears, self.group = linears, group
        block.register_forward_pre_hook(self._begin, with_kwargs=True)
        block.register_forward_hook(self._end)

    def _begin(self, block: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        for linear in self.linears:
            linear.open = True
        hidden = kwargs["hidden_states"] if block.pre_process else block.input_tensor
        hidden.register_hook(self._backward_done)  # the gradient of a block's input is the last that it computes

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
