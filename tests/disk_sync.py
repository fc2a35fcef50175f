"""Weight updates through a folder, as a run makes them for `rollout.transport: disk`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rl.engines.pool import EnginePool
from megatron_rl.weight_sync.sync import WeightSync
from megatron_rl.weight_sync.transports.disk import DiskTransport
from megatron_rl.weights.hf_folder import HFFolder


def disk_sync(
    pool: EnginePool | None,
    source: HFFolder,
    staging: Path | None = None,
    keep: int = 2,
    group: dist.ProcessGroup | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> WeightSync:
    return WeightSync(pool, source, DiskTransport(source, staging, keep, quantization), group=group)
