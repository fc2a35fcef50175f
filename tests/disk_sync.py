"""Weight updates through a folder, as in a run with `rollout.transport: disk`."""

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
    """Return a weight sync that uses the disk transport.

    Args:
        pool: the engines; None on ranks other than 0.
        source: the Hugging Face folder of the model.
        staging: folder for weight versions; None: the transport's default.
        keep: number of weight versions kept in the folder.
        group: process group of the trainer's ranks.
        quantization: the engines' quantization; None: none.
    """
    return WeightSync(pool, source, DiskTransport(source, staging, keep, quantization), group=group)
