"""Training checkpoints: sharded by megatron-core, loaded only if complete, the newest valid one first.

A checkpoint is written into `step_000020.partial`. It is renamed when every rank's part is on disk and `complete.json`
lists each file with its size. A checkpoint without this list, or with files that differ from it, is never loaded. The
next older one is loaded instead, and a message gives the reason.
"""

import hashlib
import json
import multiprocessing
import pickle
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint import CheckpointException

from megatron_rl.errors import CheckpointError
from megatron_rl.files import replace_file
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.checkpoint_state import COMPLETE, PARTIAL, TrainState, find_defect, newest_valid
from megatron_rl.policy.routing_replay import weight_buffers
from megatron_rl.weights.digest import tensor_digest


class _ReportQueue:
    """The queue in which megatron-core's writer processes report, with the methods that it uses.

    A manager process holds the reports, because they may exceed a pipe. It gets bytes and does not import torch.
    megatron-core's own manager does, for seconds of every first save, on every rank.
    """

    def __init__(self) -> None:
        self._queue = multiprocessing.get_context("spawn").Manager().Queue()

    def put(self, report: Any) -> None:
        self._queue.put(pickle.dumps(report))

    def get_nowait(self) -> Any:
        return pickle.loads(self._queue.get_nowait())


def _prepare_report_queue() -> None:
    """Give megatron-core this process's report queue, if it has none yet."""
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = _ReportQueue()


class Checkpoints:
    """The checkpoints of one run or of one stage.

    `save` returns when the state is captured. The files are written asynchronously.

    Args:
        folder: folder that holds the checkpoints.
        policy: the policy that is saved and restored.
        keep: how many of the newest checkpoints stay on disk.
        pinned: numbers of checkpoints that also stay on disk.
    """

    def __init__(self, folder: Path, policy: Policy, keep: int, pinned: Iterable[int] = ()) -> None:
        self.folder, self.policy, self.keep, self.pinned = folder, policy, keep, frozenset(pinned)
        # The persistent writer of megatron-core 0.16.1 divides by the number of CUDA devices. A new writer per save
        # works everywhere.
        self.queue = AsyncCallsQueue(persistent=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave(kind, error, trace)

    def path(self, number: int) -> Path:
        return self.folder / f"step_{number:06d}"

    def has(self, number: int) -> bool:
        """Return True if checkpoint `number` is complete on disk. Collective."""
        return self.policy.mesh.on_lead(lambda: find_defect(self.path(number)) is None)

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        """Write a checkpoint of `state`. With `wait`, return only when it is complete."""
        self.finish(wait=True)
        final = self.path(state.number)
        partial = final.with_name(final.name + PARTIAL)
        if self.policy.mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.policy.mesh.barrier()
        _prepare_report_queue()
        request = dist_checkpointing.save(self._content(state), str(partial), async_sharded_save=True)
        request.add_finalize_fn(lambda: self._complete(partial, final))
        self.queue.schedule_async_request(request)
        self.finish(wait=wait)

    def finish(self, *, wait: bool) -> None:
        """Complete a save whose files are on disk. With `wait`, block until they are. Collective.

        Raises CheckpointError if the files cannot be written.
        """
        try:
            self.queue.maybe_finalize_async_calls(blocking=wait)
        except (CheckpointException, OSError) as error:
            raise CheckpointError(
                f"the checkpoint in {self.folder} cannot be written ({error}): free space there"
            ) from error

    def close(self) -> None:
        self.finish(wait=True)
        self.queue.close()

    def leave(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the checkpoints at the end of a run. The arguments are those of `__exit__`.

        This rank cannot wait for the other ranks after an error that it alone has. Then nothing is completed, and the
        unfinished checkpoint stays `.partial`.
        """
        together = kind is None or issubclass(kind, KeyboardInterrupt) or getattr(error, "everywhere", False)
        if together:
            self.close()

    def load_newest(self) -> TrainState | None:
        """Restore the newest valid checkpoint into the policy. Return None if the folder holds none."""
        mesh = self.policy.mesh
        found, skipped = mesh.broadcast(newest_valid(self.folder) if mesh.rank == 0 else None)
        if mesh.rank == 0:
            for name, reason in skipped:
                print(f"checkpoint {name} is not usable ({reason}); trying an older one", flush=True)
        return None if found is None else self._load(found)

    def load(self, number: int) -> TrainState:
        """Restore checkpoint `number` into the policy. Raise CheckpointError if it is not complete."""
        return self._load(self._whole(number))

    def load_weights(self, number: int) -> None:
        """Load only the model weights of checkpoint `number`, for scoring.

        The optimizer state does not change. Load a whole checkpoint before an update.
        """
        folder = self._whole(number)
        content, _, lacking = _read(self._models(), folder)
        if lacking:
            raise CheckpointError(f"{folder} holds other weights than this model: '{min(lacking)}' is missing there")
        self._restore_models(content)

    def _whole(self, number: int) -> Path:
        folder = self.path(number)
        reason = self.policy.mesh.on_lead(lambda: find_defect(folder))
        if reason is not None:
            self.policy.mesh.raise_everywhere(
                CheckpointError(f"checkpoint {folder} is needed and not usable: {reason}")
            )
        return folder

    def _restore_models(self, content: dict[str, Any]) -> None:
        for i, model in enumerate(self.policy.models):
            model.load_state_dict(content[f"model{i}"])

    def _load(self, folder: Path) -> TrainState:
        content, *differing = _read(self._content(TrainState(), loading=True), folder)
        # Random states belong to one number of ranks. A run with another number of ranks starts with its own states.
        foreign = sorted(key for keys in differing for key in keys if not key.startswith("rng_of_"))
        if foreign:
            raise CheckpointError(
                f"{folder} cannot be loaded into this model and layout: {len(foreign)} entries are on one side only, "
                f"'{foreign[0]}' among them; resume with the model and optimizer settings of the run"
            )
        self._restore_models(content)
        self.policy.optimizer.load_state_dict(content["optimizer"])
        if "rng" in content:
            torch.set_rng_state(content["rng"]["torch"])
            get_cuda_rng_tracker().set_states(content["rng"]["tracker"])
        state = TrainState(**content["state"])
        self.policy.optimizer.updates = state.updates
        return state

    def _models(self) -> dict[str, Any]:
        return {
            f"model{i}": model.sharded_state_dict(metadata=_metadata()) for i, model in enumerate(self.policy.models)
        }

    def _content(self, state: TrainState, loading: bool = False) -> dict[str, Any]:
        mesh = self.policy.mesh
        models = self._models()
        self.policy.optimizer.allocate()
        content: dict[str, Any] = dict(models)
        content["optimizer"] = self.policy.optimizer.core.sharded_state_dict(
            models, is_loading=loading, metadata=_metadata()
        )
        content["state"] = asdict(state)
        rng = {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
        content["rng"] = ShardedObject(f"rng_of_{mesh.world}", rng, (mesh.world,), (mesh.rank,), replica_id=0)
        return content

    def _complete(self, partial: Path, final: Path) -> None:
        if self.policy.mesh.rank != 0:
            return
        files = {str(p.relative_to(partial)): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()}
        note = partial / COMPLETE
        replace_file(note, json.dumps({"files": files}, indent=1).encode())
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        pinned = {self.path(number) for number in self.pinned}
        for old in sorted(self.folder.glob("step_??????"))[: -self.keep]:
            if old not in pinned:
                shutil.rmtree(old)


def parameter_digest(policy: Policy) -> dict[str, str]:
    """Return the SHA-256 of each rank's parameters, names included, on every rank.

    The keys are "rank r of TPxPPxCPxDP, n chunk(s)", the values are hex digests. Equal digests mean bit-identical
    weights under one layout. The digests of two layouts share no key.
    """
    digest = hashlib.sha256()
    for i, model in enumerate(policy.models):
        for name, parameter in (*model.named_parameters(), *weight_buffers(model)):
            digest.update(f"{i} {name} {tensor_digest(parameter)} ".encode())
    mesh = policy.mesh
    digests = mesh.broadcast(mesh.gather(digest.hexdigest()))
    layout = f"{mesh.tp_size}x{mesh.pp_size}x{mesh.cp_size}x{mesh.dp_size}, {len(policy.models)} chunk(s)"
    return {f"rank {rank} of {layout}": text for rank, text in enumerate(digests)}


def _metadata() -> dict[str, Any]:
    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
    }


def _read(template: dict[str, Any], folder: Path) -> tuple[Any, set[str], set[str]]:
    """Return `template` filled from `folder`, the keys that only `folder` has, and those that only `template` has."""
    try:
        return dist_checkpointing.load(template, str(folder), strict=StrictHandling.RETURN_ALL)
    except (KeyError, ValueError, RuntimeError, dist_checkpointing.core.CheckpointingException) as error:
        raise CheckpointError(f"{folder} cannot be loaded into this model and layout: {error}") from error
