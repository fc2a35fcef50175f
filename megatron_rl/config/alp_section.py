"""The section `alp` of the configuration, and its presets."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_rl.config.block import Block

# paper: the default of arXiv 2603.19470. multi_turn: the defaults of the authors' later release
# (Chenluye99/Adaptive-Layerwise-Perturbation). The weight decay of both is that of their one AdamW. short_run is ours:
# log sigma moves by at most about lr an update, so 1e-2 lets sigma change tenfold in 230 updates.
ALP_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper": {"sigma_init": 1.0e-4, "lr": 5.0e-4, "weight_decay": 0.01},
        "multi_turn": {"sigma_init": 1.0e-8, "lr": 1.0e-2, "weight_decay": 0.01, "level": "sequence"},
        "short_run": {"sigma_init": 1.0e-3, "lr": 1.0e-2, "weight_decay": 0.0},
    }
)


class AlpConfig(Block):
    """Adaptive layerwise perturbation (arXiv 2603.19470): learnable noise at every layer's input, in updates only."""

    enabled: bool = Field(False, description="perturb the policy in updates")
    preset: Literal["paper", "multi_turn", "short_run"] | None = Field(
        None, description="named values of sigma_init, lr, weight_decay and level; keys beside it have precedence"
    )
    sigma_init: float = Field(1.0e-4, description="initial standard deviation of the noise of every layer")
    learnable: bool = Field(True, description="false: every layer keeps sigma_init")
    lr: float = Field(5.0e-4, gt=0, description="learning rate of log sigma; warmed up like optimizer.lr")
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="weight decay of log sigma; it moves log sigma toward 0, so sigma upward; the paper uses 0.01",
    )
    layers: Literal["all", "logits"] | tuple[int, int] = Field(
        "all", description="layers with noise: all, or [start, end) counted from 0; logits: noise on the logits instead"
    )
    level: Literal["token", "sequence", "cumulative", "geometric"] | None = Field(
        None, description="what one ratio spans; unset: as in the objective"
    )

    @model_validator(mode="before")
    @classmethod
    def _preset_fills_keys(cls, data: Any) -> Any:
        """Set the keys of the preset that are not given."""
        preset = data.get("preset") if isinstance(data, dict) else None
        return {**ALP_PRESETS[preset], **data} if isinstance(preset, str) and preset in ALP_PRESETS else data

    @field_validator("sigma_init")
    @classmethod
    def _positive(cls, value: float) -> float:
        if value <= 0:
            raise ValueError(
                f"it is {value}; it must be above 0, since its logarithm is learnt (no noise: enabled: false)"
            )
        return value

    @field_validator("layers")
    @classmethod
    def _range(cls, value: Any) -> Any:
        if isinstance(value, tuple) and not 0 <= value[0] < value[1]:
            raise ValueError(f"it is {list(value)}; a range is [start, end) with 0 <= start < end")
        return value
