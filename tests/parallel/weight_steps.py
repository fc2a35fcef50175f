"""Functions that the ranks of a group run to load a model under a layout, export it, and push it to engines.

The common arguments are described in `tests.parallel.steps`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_rl.config import make_config
from megatron_rl.engines.pool import EnginePool
from megatron_rl.errors import MegatronRLError
from megatron_rl.policy import parallel
from megatron_rl.policy.device_port import pick_device
from megatron_rl.weights.digest import tensor_digest
from megatron_rl.weights.export import export_weights
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.hf_model import check_folder
from megatron_rl.weights.load_weights import load_weights
from megatron_rl.weights.quantized import WireTensors, export_dtypes
from tests.disk_sync import disk_sync
from tests.policies import build_planned_chunks, embedded_plan


def round_trip(
    model: Path, layout: dict[str, Any], spoil_replicas: bool = False
) -> tuple[list[str], dict[str, str], list[str]]:
    """Load and export a model. Return the exported names, this rank's digests, and the mcore parameters not filled.

    With `spoil_replicas`, overwrite the weights of all replicas but the first before the export.
    """
    config = make_config({"model": {"path": str(model)}, "parallel": layout})
    mesh = parallel.initialize(config.parallel, pick_device("cpu"), seed=1)
    source = check_folder(HFFolder(model), tensor_parallel=mesh.tp_size)
    family, shape = source.family, source.shape
    chunks = build_planned_chunks(config, shape, mesh)
    for chunk in chunks:
        for parameter in chunk.parameters():
            nn.init.constant_(parameter, float("nan"))
    load_weights(chunks, source, tp_rank=mesh.tp_rank, tp_size=mesh.tp_size)
    unfilled = [
        name for chunk in chunks for name, parameter in chunk.named_parameters() if torch.isnan(parameter).any()
    ]
    if spoil_replicas and (mesh.dp_rank or mesh.cp_rank):
        for chunk in chunks:
            for parameter in chunk.parameters():
                nn.init.constant_(parameter, 7.0)
    exported = list(export_weights(chunks, family, shape, dtypes=source.dtypes, control=mesh.control))
    digests = {name: tensor_digest(tensor) for name, tensor in exported if tensor is not None}
    return [name for name, _ in exported], digests, unfilled


def quantized_export(model: Path, layout: dict[str, Any], precision: dict[str, Any]) -> dict[str, str]:
    """Return the digests of what rank 0 would send to quantized engines, an empty dict elsewhere."""
    config = make_config({"model": {"path": str(model)}, "parallel": layout, "precision": precision})
    mesh = parallel.initialize(config.parallel, pick_device("cpu"), seed=1)
    source = check_folder(HFFolder(model), tensor_parallel=mesh.tp_size)
    family, shape = source.family, source.shape
    chunks = build_planned_chunks(config, shape, mesh)
    load_weights(chunks, source, tp_rank=mesh.tp_rank, tp_size=mesh.tp_size)
    plan = embedded_plan(config.precision, shape.num_layers)
    stream = export_weights(chunks, family, shape, dtypes=export_dtypes(plan, source), control=mesh.control)
    return {name: tensor_digest(tensor) for name, tensor in WireTensors(stream, plan) if tensor is not None}


def push(model: Path, layout: dict[str, Any], url: str, staging: Path) -> list[str]:
    """Make three pushes, the second one with NaN in the last layer. Return the version or the error of each."""
    config = make_config({"model": {"path": str(model)}, "parallel": layout})
    mesh = parallel.initialize(config.parallel, pick_device("cpu"), seed=1)
    source = check_folder(HFFolder(model), tensor_parallel=mesh.tp_size)
    family, shape = source.family, source.shape
    chunks = build_planned_chunks(config, shape, mesh)
    pool = EnginePool([url]) if mesh.rank == 0 else None
    sync = disk_sync(pool, source, staging, group=mesh.control)
    outcomes = []
    for version, value in ((1, 0.5), (2, float("nan")), (3, 0.25)):
        load_weights(chunks, source, tp_rank=mesh.tp_rank, tp_size=mesh.tp_size)
        for chunk in chunks:
            for layer in chunk.decoder.layers:
                if layer.layer_number == shape.num_layers:
                    nn.init.constant_(layer.mlp.linear_fc2.weight, value)
        try:
            report = sync.push(
                export_weights(chunks, family, shape, dtypes=source.dtypes, control=mesh.control), version
            )
            outcomes.append(str(report.version))
        except MegatronRLError as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    sync.close()
    if pool is not None:
        pool.close()
    return outcomes
