"""What the oldest and the newest allowed megatron-core want differently. No other module looks at its version."""

import inspect
from typing import Any

from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

# From 0.17 on, an asynchronous save is done by nvidia-resiliency-ext, unless megatron-core's own one is asked for.
_named = "async_strategy" in inspect.signature(TorchDistSaveShardedStrategy.async_save).parameters
ASYNC_SAVE: dict[str, Any] = {"async_strategy": "mcore"} if _named else {}
