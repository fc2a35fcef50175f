"""megatron-core's optimizer, stepped so that a non-finite gradient is found before any parameter changes."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
    optim_state_to_sharding_state,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer import ParamKey, clip_grads, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megatron_rl.alp.names import LOG_SIGMA
from megatron_rl.config import AlpConfig, OptimizerConfig
from megatron_rl.errors import CheckpointError, PrecisionError

# The loss scale of float16 training. Scales are powers of two, so that scaling alone rounds nothing.
# megatron-core starts at 2^32, where the gradients of nearly every model overflow. The first update would then only
# search for a scale. At 2^16, gradients down to 1e-12 are kept, and those of a loss divided by its tokens mostly fit.
INITIAL_SCALE = 2.0**16
MIN_SCALE = 1.0
# Gradients of zero never overflow. Without a limit the scale would grow to infinity, and half of infinity is infinity.
# 2^32 is where megatron-core starts.
MAX_SCALE = 2.0**32
# megatron-core raises the scale after 1000 updates without an overflow. A reinforcement-learning run makes hundreds of
# updates. A scale that one outlier lowered must grow again within them. A scale that is too high costs only one more
# pass in a hundred updates.
GROWTH_INTERVAL = 100
T = TypeVar("T")


@dataclass(frozen=True)
class Gradients:
    """Statistics of the gradients that `PolicyOptimizer.fill` computed.

    Attributes:
        norm: global L2 norm of the summed gradients, without any loss scale.
        metrics: in float16 the loss scale of these gradients and the number of overflows before them; else empty.
    """

    norm: float
    metrics: dict[str, float]


class PolicyOptimizer:
    """Adam with warm-up and a global gradient clip over the chunks of one rank.

    The scales of a perturbation are a parameter group of their own, with the learning rate and weight decay of `alp`.

    Args:
        config: settings of the optimizer.
        alp: settings of the perturbation.
        chunks: this rank's model chunks.
        dtype: dtype of the model's parameters.
    """

    def __init__(
        self, config: OptimizerConfig, alp: AlpConfig, chunks: list[DistributedDataParallel], dtype: torch.dtype
    ) -> None:
        self.config, self.alp = config, alp
        self.base_lr = config.lr
        self.updates = 0
        core = CoreOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.grad_clip,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            initial_loss_scale=INITIAL_SCALE,
            min_loss_scale=MIN_SCALE,
            loss_scale_window=GROWTH_INTERVAL,
            # The pass after an overflow is over the same batch. With an unchanged scale it would overflow again.
            hysteresis=1,
            use_distributed_optimizer=config.distributed,
        )
        groups = get_standard_config_overrides(core)
        if alp.enabled and alp.learnable:
            # megatron-core marks a group with another learning rate by this field, and its checkpoints identify the
            # group by it.
            groups[ParamKey(name=f"*.{LOG_SIGMA}")] = ParamGroupOverride(is_decoupled_lr=True)
        self.core: Any = get_megatron_optimizer(core, chunks, config_overrides=groups)
        for part in self.core.chained_optimizers:
            if type(part) is DistributedOptimizer and isinstance(part.optimizer, torch.optim.AdamW):
                part.__class__ = TorchDistributedOptimizer
            elif type(part) is Float16OptimizerWithFloat16Params and any(part.fp32_from_fp32_groups):
                part.__class__ = MixedOptimizer
        self.scaler: Any = None
        if dtype == torch.float16:
            # With several parts, each scaler would detect only its own part's overflows, and the scales would diverge.
            (part,) = self.core.chained_optimizers
            self.scaler = part.grad_scaler
            self._first_scale = self.scaler.state_dict()

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return self.base_lr * self._warmth

    @property
    def _warmth(self) -> float:
        warmup = self.config.warmup_updates
        return min(1.0, (self.updates + 1) / warmup) if warmup else 1.0

    def restart(self) -> None:
        """Reset the optimizer to its state before the first update. Parameters stay.

        Moments and counts are zero, the loss scale is the first one, and the warm-up starts again.
        """
        self.updates = 0
        if self.scaler is not None:
            self.scaler.load_state_dict(self._first_scale)
        for part in self.core.chained_optimizers:
            for group in part.optimizer.param_groups:
                if "step" in group:  # fused optimizers keep the count in the group
                    group["step"] = 0
            for state in part.optimizer.state.values():
                for name, value in state.items():
                    if isinstance(value, torch.Tensor) and name != "master_param":
                        value.zero_()

    def allocate(self) -> None:
        """Create the zero moments and counts that the first update would create, unless they exist.

        megatron-core saves an optimizer without them in a form that it cannot load.
        """
        for part in self.core.chained_optimizers:
            if isinstance(part.optimizer, torch.optim.AdamW):
                _zero_moments(part.optimizer)
            else:
                part.init_state_fn(part.optimizer, part.config)

    def load_state_dict(self, content: Any) -> None:
        """Load the optimizer state of a checkpoint, also of torch's AdamW into Transformer Engine's and back.

        megatron-core continues without a loss scale if the checkpoint has none. So CheckpointError is raised here if
        only one of checkpoint and optimizer has a loss scale.
        """
        parts = self.core.chained_optimizers
        if ("grad_scaler" in content) != (self.scaler is not None):
            found = "a loss scale: it was trained" if "grad_scaler" in content else "no loss scale: it was not trained"
            raise CheckpointError(
                f"the checkpoint holds {found} with precision.train: fp16; resume with the precision it had"
            )
        for part, state in zip(
            parts, [content] if len(parts) == 1 else [content[i] for i in range(len(parts))], strict=True
        ):
            inner = state.get("optimizer", state)
            if "state" in inner:
                _place_count(inner, isinstance(part.optimizer, torch.optim.AdamW))
            for group in inner.get("param_groups", ()):
                group.update({name: value for name, value in part.optimizer.defaults.items() if name not in group})
        self.core.load_state_dict(content)

    def zero_grad(self) -> None:
        self.core.zero_grad()

    def fill(self, make: Callable[[], T]) -> tuple[T, Gradients]:
        """Call `make`, which writes the gradients of the scaled loss into empty buffers.

        If gradients overflow in float16, they are computed again on the same batch with half the loss scale, until they
        fit. All ranks do so together.

        Returns:
            The result of `make`, and the statistics of the gradients.

        Raises:
            PrecisionError: on all ranks, if no scale helps or the norm is not finite. The loss scale is then restored
                to its value before the call. It is also restored after a PrecisionError of `make`.
        """
        if self.scaler is None:
            made = make()
            self.core.prepare_grads()
            return made, Gradients(self._norm(), {})
        kept = self.scaler.state_dict()
        try:
            return self._fill_scaled(make)
        except PrecisionError:
            self.scaler.load_state_dict(kept)
            raise

    def _fill_scaled(self, make: Callable[[], T]) -> tuple[T, Gradients]:
        overflows = 0
        while True:
            scale = float(self.core.get_loss_scale())
            made = make()
            if not self.core.prepare_grads():
                self.scaler.scale.clamp_(max=MAX_SCALE)
                found = {"optimizer/loss_scale": scale, "optimizer/overflows": float(overflows)}
                return made, Gradients(self._norm(), found)
            overflows += 1
            if scale <= MIN_SCALE:
                raise _refusal(
                    f"gradients overflow float16 {overflows} times, down to a loss scale of {scale:g}",
                    "lower what the objective multiplies, or set precision.train: bf16",
                )

    def _norm(self) -> float:
        """Return the global norm of the gradients in the buffers."""
        norm = float(self.core.get_grad_norm())
        if not math.isfinite(norm):
            raise _refusal(
                f"gradient norm is {norm}",
                "lower what the objective multiplies (rewards, coefficients), or set precision.train: fp32 and "
                "precision.recipe: none",
            )
        return norm

    def step(self, grad_norm: float) -> None:
        """Clip the gradients, whose norm is the finite `grad_norm`, to `grad_clip` and update the parameters."""
        for part in self.core.chained_optimizers:
            if self.config.grad_clip > 0 and part.get_parameters():
                clip_grads.clip_grad_by_total_norm_fp32(part.get_parameters(), self.config.grad_clip, grad_norm)
        for group in self.core.param_groups:  # lr_mult and wd_mult have no effect unless applied here
            if group.get("is_decoupled_lr", False):
                group["lr"], group["weight_decay"] = self.alp.lr * self._warmth, self.alp.weight_decay
                continue
            group["lr"] = self.lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.config.weight_decay * group.get("wd_mult", 1.0)
        self.core.step_with_ready_grads()
        self.updates += 1


def _refusal(what: str, mend: str) -> PrecisionError:
    """Return the error of a refused update. Gradients are summed over ranks by now, so every rank raises it."""
    error = PrecisionError(f"{what}: the update is refused, parameters are untouched; {mend}")
    error.everywhere = True
    return error


class TorchDistributedOptimizer(DistributedOptimizer):
    """DistributedOptimizer over torch.optim.AdamW (no Apex, no Transformer Engine) with correct checkpoints.

    The checkpoints of megatron-core 0.16.1 are wrong in this case. state_dict fails before the first step. Loading
    fails on torch's per-parameter 'step'. A load that succeeds leaves ONE step tensor shared by all parameters. It then
    counts once per parameter, and the bias correction is silently wrong.
    """

    def state_dict(self) -> dict[str, Any]:
        _zero_moments(self.optimizer)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        _zero_moments(self.optimizer)
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].detach().clone()

    def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        main.detach().copy_(tensors["param"])
        for name in ("exp_avg", "exp_avg_sq"):
            self.optimizer.state[main][name].copy_(tensors[name])


class MixedOptimizer(Float16OptimizerWithFloat16Params):
    """megatron-core's optimizer of 16-bit parameters, beside which there are float32 ones: the scales of ALP.

    Its checkpoints in megatron-core 0.16.1 number the 16-bit parameters alone, and torch numbers all of them. The state
    of one parameter would be saved under the name of another.
    """

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        if is_loading:
            self.init_state_fn(self.optimizer, self.config)
        state: dict[str, Any] = self.state_dict()
        owner = {id(main): model for main, model in self._masters()}
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        owners = [owner.get(id(parameter), parameter) for parameter in parameters]
        sharded = get_param_id_to_sharded_param_map(model_sharded_state_dict, iter(owners))
        number = {id(parameter): at for at, parameter in enumerate(parameters)}
        # One list, because the group of the scales has none, and an empty list cannot be restored.
        state["fp32_from_fp16_params"] = [
            make_sharded_optimizer_tensor(sharded[number[id(main)]], main, prefix="optimizer.state.fp32_param")
            for main, _ in self._masters()
        ]
        step = self._extract_common_per_param_step(state["optimizer"])
        optim_state_to_sharding_state(state["optimizer"], sharded, exclude_keys="step")
        if step:
            state["optimizer"]["state"]["common_step"] = step
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        masters = iter(state_dict["fp32_from_fp16_params"])
        state_dict["fp32_from_fp16_params"] = [[next(masters) for _ in group] for group in self.float16_groups]
        super().load_state_dict(state_dict)

    def _masters(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each float32 copy with its 16-bit parameter."""
        for mains, models in zip(self.fp32_from_float16_groups, self.float16_groups, strict=True):
            yield from zip(mains, models, strict=True)


def _place_count(state: dict[str, Any], per_parameter: bool) -> None:
    """Put the count of updates of a saved state where the optimizer that loads it looks for it.

    torch's AdamW counts for each parameter, which megatron-core saves as one `common_step`, unless it is 0. Fused
    optimizers count for each group.

    Args:
        state: state and groups of one optimizer.
        per_parameter: whether the loading optimizer counts for each parameter.
    """
    counts = [group.pop("step") for group in state["param_groups"] if "step" in group]
    count = float(state["state"].pop("common_step", max(counts, default=0)))
    if per_parameter:
        state["state"]["common_step"] = torch.tensor(count)
        return
    for group in state["param_groups"]:
        group["step"] = int(count)


def _zero_moments(optimizer: torch.optim.AdamW) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter.data)
                state["exp_avg_sq"] = torch.zeros_like(parameter.data)
