"""Training checkpoints: sharded by megatron-core, complete or absent, newest valid first.

A checkpoint is written into `step_000020.partial` and renamed when every rank's part is on disk and
`complete.json` lists each file with its size. What carries no such list, or whose files differ from it, is
never loaded: the next older one is taken, and it is said so.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint import CheckpointException

from megatron_rl.errors import CheckpointError
from megatron_rl.policy.actor import Policy

COMPLETE = "complete.json"


@dataclass(frozen=True)
class TrainState:
    """Everything a run needs besides tensors. step: steps done; version: weight version the engines serve.

    Version 0 is the folder engines start from; the first one a run publishes, and proves, is 1.
    """

    step: int = 0
    version: int = 1
    updates: int = 0
    seed: int = 0


class Checkpoints:
    """The `checkpoints/` folder of one run. `save` returns once the state is captured; files follow asynchronously."""

    def __init__(self, folder: Path, policy: Policy, keep: int) -> None:
        self.folder, self.policy, self.keep = folder, policy, keep
        # The persistent writer of 0.16.1 divides by the number of CUDA devices; the per-save one works everywhere.
        self.queue = AsyncCallsQueue(persistent=False)

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        """Write a checkpoint of `state`. wait: return only when it is complete."""
        self.finish(wait=True)
        final = self.folder / f"step_{state.step:06d}"
        partial = final.with_name(final.name + ".partial")
        if self.policy.mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.policy.mesh.barrier()
        request = dist_checkpointing.save(self._content(state), str(partial), async_sharded_save=True)
        request.add_finalize_fn(lambda: self._complete(partial, final))
        self.queue.schedule_async_request(request)
        self.finish(wait=wait)

    def finish(self, *, wait: bool) -> None:
        """Complete a save whose files are on disk; with `wait`, until they are. Collective."""
        try:
            self.queue.maybe_finalize_async_calls(blocking=wait)
        except (CheckpointException, OSError) as error:
            raise CheckpointError(f"the checkpoint in {self.folder} cannot be written ({error}): free space there") from error

    def close(self) -> None:
        self.finish(wait=True)
        self.queue.close()

    def leave(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close at the end of a run. After an error of this rank alone the others cannot be waited for, so nothing is
        completed: the unfinished checkpoint stays `.partial`."""
        together = kind is None or issubclass(kind, KeyboardInterrupt) or getattr(error, "everywhere", False)
        if together:
            self.close()

    def load_newest(self) -> TrainState | None:
        """Restore the newest valid checkpoint into the policy; None when the folder holds none."""
        mesh = self.policy.mesh
        found, skipped = mesh.broadcast(newest_valid(self.folder) if mesh.rank == 0 else None)
        if mesh.rank == 0:
            for name, reason in skipped:
                print(f"checkpoint {name} is not usable ({reason}); trying an older one", flush=True)
        return None if found is None else self._load(found)

    def _load(self, folder: Path) -> TrainState:
        template = self._content(TrainState(), loading=True)
        try:
            content, *differing = dist_checkpointing.load(template, str(folder), strict=StrictHandling.RETURN_ALL)
        except (KeyError, ValueError, RuntimeError, dist_checkpointing.core.CheckpointingException) as error:
            raise CheckpointError(f"{folder} cannot be loaded into this model and layout: {error}") from error
        # Random states belong to a number of ranks; another number starts its own.
        foreign = sorted(key for keys in differing for key in keys if not key.startswith("rng_of_"))
        if foreign:
            raise CheckpointError(
                f"{folder} cannot be loaded into this model and layout: {len(foreign)} entries are on one side only, "
                f"'{foreign[0]}' among them; resume with the model and optimizer settings of the run"
            )
        for i, model in enumerate(self.policy.models):
            model.load_state_dict(content[f"model{i}"])
        self.policy.optimizer.core.load_state_dict(content["optimizer"])
        if "rng" in content:
            torch.set_rng_state(content["rng"]["torch"])
            get_cuda_rng_tracker().set_states(content["rng"]["tracker"])
        state = TrainState(**content["state"])
        self.policy.optimizer.updates = state.updates
        return state

    def _content(self, state: TrainState, loading: bool = False) -> dict[str, Any]:
        mesh = self.policy.mesh
        metadata = {
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
        }
        content: dict[str, Any] = {
            f"model{i}": model.sharded_state_dict(metadata=metadata) for i, model in enumerate(self.policy.models)
        }
        models = {name: part for name, part in content.items() if name.startswith("model")}
        content["optimizer"] = self.policy.optimizer.core.sharded_state_dict(models, is_loading=loading, metadata=metadata)
        content["state"] = asdict(state)
        rng = {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
        content["rng"] = ShardedObject(f"rng_of_{mesh.world}", rng, (mesh.world,), (mesh.rank,), replica_id=0)
        return content

    def _complete(self, partial: Path, final: Path) -> None:
        if self.policy.mesh.rank != 0:
            return
        files = {str(p.relative_to(partial)): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()}
        note = partial / COMPLETE
        note.write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
        with note.open() as handle:
            os.fsync(handle.fileno())
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        for old in sorted(self.folder.glob("step_??????"))[: -self.keep]:
            shutil.rmtree(old)


def newest_valid(folder: Path) -> tuple[Path | None, list[tuple[str, str]]]:
    """The newest checkpoint whose every file is there in full, and (name, reason) of newer ones passed over."""
    skipped: list[tuple[str, str]] = []
    for candidate in sorted(folder.glob("step_*"), reverse=True):
        reason = what_is_wrong(candidate)
        if reason is None:
            return candidate, skipped
        skipped.append((candidate.name, reason))
    return None, skipped


def what_is_wrong(folder: Path) -> str | None:
    """None for a complete checkpoint, else the reason in words."""
    note = folder / COMPLETE
    if not note.is_file():
        return f"half-written: no {COMPLETE}"
    try:
        files = json.loads(note.read_text(encoding="utf-8"))["files"]
    except (json.JSONDecodeError, KeyError):
        return f"{COMPLETE} is damaged"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None
