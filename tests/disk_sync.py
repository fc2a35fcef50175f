"""Weight updates through a folder, as a run makes them for `rollout.transport: disk`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rl.weights.hf import HFFolder
from megatron_rl.weights.sync import WeightSync
from megatron_rl.weights.transaction import Engines
from megatron_rl.weights.transports.disk import DiskTransport


def disk_sync(
    pool: Engines | None,
    source: HFFolder,
    staging: Path | None = None,
    keep: int = 2,
    group: dist.ProcessGroup | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> WeightSync:
    return WeightSync(pool, source, DiskTransport(source, staging, keep, quantization), group=group)
