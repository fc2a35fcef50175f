"""Configuration: its keys, its rules, and how it is loaded from a file with overrides."""

from megatron_rl.config.alp_section import AlpConfig
from megatron_rl.config.load import changed_keys, load_config, make_config
from megatron_rl.config.schema import (
    Config,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    RunConfig,
    SGLangConfig,
    TaskConfig,
)

__all__ = [
    "AlpConfig",
    "Config",
    "EvalConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RolloutConfig",
    "RunConfig",
    "SGLangConfig",
    "TaskConfig",
    "changed_keys",
    "load_config",
    "make_config",
]
