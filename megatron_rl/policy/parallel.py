"""Process groups: one torch.distributed world, divided into megatron-core's groups."""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed import distributed_c10d

from megatron_rl.config import Config, ParallelConfig
from megatron_rl.errors import ConfigError, MegatronRLError
from megatron_rl.policy.device_port import pick_device

T = TypeVar("T")
_LEAVE_S = 10.0  # time for the other ranks to close what they own
_EXIT_S = 1.0  # time for their interpreters to end
_HOST_TIMEOUT = timedelta(hours=6)  # ranks wait for rank 0, and rank 0 for engines


@dataclass(frozen=True)
class Mesh:
    """This rank's position in the parallel layout.

    Attributes:
        rank: this rank's number in the world.
        world: number of ranks in the world.
        tp_rank: this rank's number in its tensor-parallel group.
        tp_size: tensor-parallel size.
        pp_rank: this rank's pipeline stage.
        pp_size: pipeline-parallel size.
        cp_rank: this rank's number in its context-parallel group.
        cp_size: context-parallel size.
        dp_rank: this rank's number in its data-parallel group.
        dp_size: data-parallel size.
        device: this rank's device.
        control: gloo group over all ranks for host objects.
        leaders: gloo group of the first rank of each data-parallel replica; None with one replica.
        replica: gloo group of the ranks of this replica; None if this rank is its only one.
        leader: number of the first rank of this replica.
    """

    rank: int
    world: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    device: torch.device
    control: dist.ProcessGroup
    leaders: dist.ProcessGroup | None
    replica: dist.ProcessGroup | None
    leader: int

    @property
    def reports(self) -> bool:
        """True on the one rank per data-parallel replica whose last-stage results are collected."""
        return self.pp_rank == self.pp_size - 1 and self.tp_rank == 0 and self.cp_rank == 0

    def broadcast(self, value: Any) -> Any:
        """Return the host object of rank 0 on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the host objects of all ranks in rank order on rank 0, an empty list elsewhere."""
        boxes: list[Any] = [None] * self.world if self.rank == 0 else []
        dist.gather_object(value, boxes if self.rank == 0 else None, dst=0, group=self.control)
        return boxes

    def on_lead(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and return its result on every rank. Raise its error or interrupt on every rank."""
        value, failure = self.broadcast(_outcome(work) if self.rank == 0 else None)
        self.raise_everywhere(failure)
        return value

    def keep_on_lead(self, work: Callable[[], T], elsewhere: Callable[[T], T]) -> T:
        """Run `work` on rank 0 and return its result there. Other ranks get the small part of it that they need.

        Args:
            work: its error or interrupt is raised on every rank.
            elsewhere: returns the part for the other ranks.
        """
        kept: list[T] = []

        def run() -> T:
            kept.append(work())
            return elsewhere(kept[0])

        part = self.on_lead(run)
        return kept[0] if kept else part

    def scatter(self, work: Callable[[], Sequence[T]]) -> T:
        """Run `work` on rank 0, and return its r-th result on the ranks of data-parallel replica r.

        Rank 0 sends a result once, to the first rank of the replica, which broadcasts it to the others. An error or
        interrupt of `work` is raised on every rank.
        """
        box: list[Any] = [None]
        outcomes: list[Any] | None = None
        if self.rank == 0:
            values, failure = _outcome(work)
            outcomes = [(None if values is None else values[r], failure) for r in range(self.dp_size)]
            box = outcomes[:1]
        if self.leaders is not None and self.rank == self.leader:
            dist.scatter_object_list(box, outcomes, src=0, group=self.leaders)
        if self.replica is not None:
            dist.broadcast_object_list(box, src=self.leader, group=self.replica)
        value, failure = box[0]
        self.raise_everywhere(failure)
        return value

    def raise_everywhere(self, failure: BaseException | None) -> None:
        """Raise an error that every rank has, and mark it so that only rank 0 prints it. Do nothing for None."""
        if isinstance(failure, MegatronRLError):
            failure.everywhere = True
        if failure is not None:
            raise failure

    def any(self, flag: bool) -> bool:
        """Return True on every rank if `flag` is True on any rank."""
        word = torch.tensor([int(flag)])
        dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self.control)
        return bool(word.item())

    def barrier(self) -> None:
        dist.barrier(group=self.control)


def _outcome(work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """Return the result of `work`, or its error: other ranks wait for the outcome, so every error must reach them."""
    try:
        return work(), None
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
        return None, error


_control: dist.ProcessGroup | None = None


def initialize(config: ParallelConfig, device: torch.device, seed: int) -> Mesh:
    """Join the world of RANK/WORLD_SIZE/MASTER_ADDR/MASTER_PORT and divide it into groups.

    A world of one rank, also without these variables, needs no address, and sets no variable for later processes.

    A process may call this again with another layout. The old groups are destroyed first.

    Args:
        config: the parallel layout.
        device: this rank's device; CUDA uses nccl, other devices use gloo.
        seed: seed of megatron-core's random states.

    Raises:
        ConfigError: the number of ranks is not tensor x pipeline x context x data.
    """
    global _control
    if not dist.is_initialized():
        alone = (os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")) == ("0", "1")
        options: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30), **options)
        _control = dist.new_group(backend="gloo", timeout=_HOST_TIMEOUT)
        if device.type == "cuda":
            refuse_shared_gpus(_gather(_gpu_name(device), _control))
    world = dist.get_world_size()
    if world != config.world_size:
        raise ConfigError(
            f"{world} ranks were started, but parallel asks for tensor {config.tensor} x pipeline {config.pipeline} x "
            f"context {config.context} x data {config.data} = {config.world_size}: "
            "change parallel.data or the number of ranks"
        )
    if parallel_state.model_parallel_is_initialized():
        _leave_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        # An expert is small, so one rank holds it whole. Ranks that split the other matrices hold different experts.
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=1,
    )
    model_parallel_cuda_manual_seed(seed)
    assert _control is not None
    leaders, replica, leader = _host_groups(parallel_state.get_data_parallel_rank(), _control)
    return Mesh(
        rank=dist.get_rank(),
        world=world,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=config.tensor,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=config.pipeline,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=config.context,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=config.data,
        device=device,
        control=_control,
        leaders=leaders,
        replica=replica,
        leader=leader,
    )


def _host_groups(
    dp_rank: int, control: dist.ProcessGroup
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None, int]:
    """Return `Mesh.leaders`, `Mesh.replica` and `Mesh.leader` of this rank. Collective."""
    replicas: dict[int, list[int]] = {}
    for rank, replica in enumerate(_gather(dp_rank, control)):
        replicas.setdefault(replica, []).append(rank)
    firsts = sorted(ranks[0] for ranks in replicas.values())

    def group(ranks: list[int]) -> dist.ProcessGroup | None:
        if len(ranks) in (1, dist.get_world_size()):
            return None if len(ranks) == 1 else control
        return dist.new_group(ranks, backend="gloo", timeout=_HOST_TIMEOUT)

    leaders = group(firsts)
    groups = {replica: group(ranks) for replica, ranks in sorted(replicas.items())}
    return leaders, groups[dp_rank], replicas[dp_rank][0]


def refuse_shared_gpus(names: Sequence[str]) -> None:
    """Raise ConfigError if two ranks have the same GPU, which NCCL refuses with an error that names no cause.

    `names` are those of the ranks' GPUs, equal only for the same GPU of the same machine.
    """
    for rank, name in enumerate(names):
        first = names.index(name)
        if first < rank:
            error = ConfigError(
                f"ranks {first} and {rank} are both on GPU {name}: start at most one rank a GPU (LOCAL_RANK chooses "
                "it, or the launcher shows each rank a GPU of its own)"
            )
            error.everywhere = True
            raise error


def _gpu_name(device: torch.device) -> str:
    return f"{torch.cuda.get_device_properties(device).uuid} of {socket.gethostname()}"


def _gather(value: T, group: dist.ProcessGroup) -> list[T]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value, group=group)
    return found


def _leave_groups() -> None:
    """Destroy megatron-core's groups. Collective.

    megatron-core itself only drops its references. The threads and sockets of the groups would stay.
    """
    dist.barrier(group=_control)  # no rank may still be inside a collective of a group that another rank destroys
    parallel_state.destroy_model_parallel()
    for group in list(distributed_c10d._world.pg_map):
        if group not in (dist.group.WORLD, _control):
            dist.destroy_process_group(group)


def shutdown() -> None:
    """Leave the world. Calling this without a world is safe."""
    global _control
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    _control = None


def _let_others_leave(mesh: Mesh) -> None:
    """Let rank 0 leave last after a stop. A launcher may end every rank as soon as one has ended with a code."""
    store = distributed_c10d._get_default_store()
    if mesh.rank != 0:
        store.set(f"left/{mesh.rank}", "")
    elif mesh.world > 1:
        with suppress(RuntimeError):  # a rank that is gone leaves no word
            store.wait([f"left/{rank}" for rank in range(1, mesh.world)], timedelta(seconds=_LEAVE_S))
        time.sleep(_EXIT_S)


def variables_of_trainer(config: Config) -> dict[str, str]:
    """Return the environment that CUDA and NCCL must find when a rank starts. A value of the user's own stays.

    Tensor parallelism without Transformer Engine counts on the order of kernels, which several connections to the
    device do not keep. SGLang turns NCCL's cuMem allocations off, and both sides of a broadcast must agree.
    """
    found = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if config.parallel.tensor > 1 else {}
    return found | ({"NCCL_CUMEM_ENABLE": "0"} if config.rollout.transport == "distributed" else {})


@contextmanager
def joined_mesh(config: Config) -> Iterator[Mesh]:
    """Pick the device, join the world and divide it into the configured layout; leave it afterwards. Collective.

    On a CPU every rank of several uses one thread. Raises ConfigError if the device or the number of
    ranks is not available.
    """
    for name, value in variables_of_trainer(config).items():
        os.environ.setdefault(name, value)
    device = pick_device(config.run.device)
    if device.type == "cpu" and config.parallel.world_size > 1:
        torch.set_num_threads(1)
    mesh = initialize(config.parallel, device, config.run.seed)
    try:
        yield mesh
    except KeyboardInterrupt:
        _let_others_leave(mesh)
        raise
    finally:
        shutdown()
