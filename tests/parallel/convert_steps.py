"""Functions that the ranks of a group run: megatron-core writes and reads checkpoints that conversions meet.

The common arguments are described in `tests.parallel.steps`.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from torch import nn

from megatron_rl.config import make_config
from megatron_rl.policy import parallel
from megatron_rl.policy.checkpoint import Checkpoints
from megatron_rl.policy.checkpoint_state import TrainState
from megatron_rl.policy.device_port import pick_device
from megatron_rl.weights.digest import tensor_digest
from megatron_rl.weights.export import export_weights
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.hf_model import HFModel, check_folder
from megatron_rl.weights.load_weights import load_weights
from tests.parallel.steps import make_policy
from tests.policies import build_planned_chunks


def _model(model: Path, layout: dict[str, Any]) -> tuple[parallel.Mesh, HFModel, list[Any]]:
    config = make_config({"model": {"path": str(model)}, "parallel": layout})
    mesh = parallel.initialize(config.parallel, pick_device("cpu"), seed=1)
    source = check_folder(HFFolder(model), tensor_parallel=mesh.tp_size, expert_parallel=config.parallel.expert)
    chunks = build_planned_chunks(config, source.shape, mesh)
    for chunk in chunks:
        for parameter in chunk.parameters():
            nn.init.constant_(parameter, float("nan"))
    return mesh, source, chunks


def _sharded(chunk: Any) -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state: dict[str, Any] = chunk.sharded_state_dict(metadata={"dp_cp_group": group})
    return state


def save_as_megatron(model: Path, layout: dict[str, Any], out: Path) -> None:
    """Write a checkpoint as Megatron-LM does: sharded weights of this layout, arguments, tracker file."""
    mesh, source, chunks = _model(model, layout)
    load_weights(chunks, source, tp_rank=mesh.tp_rank, tp_size=mesh.tp_size)
    folder = out / "iter_0000007"
    if mesh.rank == 0:
        folder.mkdir(parents=True)
        (out / "latest_checkpointed_iteration.txt").write_text("7")
    mesh.barrier()
    args = Namespace(num_layers=source.shape.num_layers, tensor_model_parallel_size=mesh.tp_size)
    content = {"args": args, "iteration": 7, "checkpoint_version": 3.0, "model": _sharded(chunks[0])}
    dist_checkpointing.save(content, str(folder))


def load_megatron(model: Path, layout: dict[str, Any], checkpoint: Path) -> dict[str, str]:
    """Load a checkpoint with megatron-core, and return the digests of the exported tensors on rank 0."""
    mesh, source, chunks = _model(model, layout)
    loaded = dist_checkpointing.load({"model": _sharded(chunks[0])}, str(checkpoint))
    chunks[0].load_state_dict(loaded["model"])
    stream = export_weights(chunks, source.family, source.shape, dtypes=source.dtypes, control=mesh.control)
    return {name: tensor_digest(tensor) for name, tensor in stream if tensor is not None}


def save_training(model: Path, layout: dict[str, Any], folder: Path) -> None:
    """Write a training checkpoint of a policy that has not been updated."""
    policy = make_policy(model, layout)
    with Checkpoints(folder, policy, keep=1) as checkpoints:
        checkpoints.save(TrainState(step=3), wait=True)


def save_with_optimizer(model: Path, layout: dict[str, Any], folder: Path, sharding: str) -> None:
    """Write weights and the state of megatron-core's distributed optimizer, in one of its formats."""
    policy = make_policy(model, layout, optimizer={"distributed": True})
    policy.optimizer.allocate()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"dp_cp_group": group, "distrib_optim_sharding_type": sharding}
    weights = policy.models[0].sharded_state_dict(metadata=metadata)
    if policy.mesh.rank == 0:
        folder.mkdir()
    policy.mesh.barrier()
    content = {"model": weights, "optimizer": policy.optimizer.core.sharded_state_dict(weights, metadata=metadata)}
    dist_checkpointing.save(content, str(folder))
