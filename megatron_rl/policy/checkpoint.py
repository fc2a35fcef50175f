"""Training checkpoints: sharded by megatron-core, loaded only if complete and undamaged, the newest one first.

A checkpoint is written into `step_000020.partial`. It is renamed when every rank's part is on disk and `complete.json`
lists each file with its size and digest. A checkpoint without this list, or with files that differ from it, is never
loaded. The next older one is loaded instead, and a message gives the reason.
"""

import hashlib
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_rl.errors import CheckpointError, StorageError
from megatron_rl.files import sync_folder
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.checkpoint_files import PARTIAL, FileList, check_digests, find_defect, read_list, shares
from megatron_rl.policy.checkpoint_reader import Unreadable, inspect, read_content
from megatron_rl.policy.checkpoint_state import TrainState, candidates
from megatron_rl.policy.checkpoint_writer import start_save
from megatron_rl.policy.routing_replay import weight_buffers
from megatron_rl.weights.digest import tensor_digest

T = TypeVar("T")
# Entries that one side alone may have. Random states belong to one number of ranks: a run with another number starts
# with its own. Transformer Engine's norms have an extra state, which is empty, because a norm quantizes nothing.
_OWN = re.compile(r"rng_of_\d+|.*norm\._extra_state(/|$)")


class Checkpoints:
    """The checkpoints of one run or of one stage.

    `save` returns when the state is captured. The files are written asynchronously.

    Args:
        folder: folder that holds the checkpoints.
        policy: the policy that is saved and restored.
        keep: how many of the newest checkpoints stay on disk.
        pinned: numbers of checkpoints that also stay on disk.
        guard: called on rank 0 before anything is written or removed; it raises if this process may not.

    Attributes:
        saved: number of the newest checkpoint that this process has begun to save; None: none yet.
        save_s: seconds that the last saves took until their files were on disk. On rank 0.
    """

    def __init__(
        self,
        folder: Path,
        policy: Policy,
        keep: int,
        pinned: Iterable[int] = (),
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.policy, self.keep, self.pinned = folder, policy, keep, frozenset(pinned)
        self.guard = guard
        self.saved: int | None = None
        self.save_s: deque[float] = deque(maxlen=100)
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
        """Return True if checkpoint `number` is complete on disk, by names and sizes. Collective."""
        return self.policy.mesh.on_lead(lambda: find_defect(self.path(number)) is None)

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        """Write a checkpoint of `state`. With `wait`, return only when it is complete."""
        self.finish(wait=True)
        final = self.path(state.number)
        partial = final.with_name(final.name + PARTIAL)
        began = time.time()
        self.policy.mesh.on_lead(lambda: self._begin(partial))
        start_save(
            self._content(state), partial, self.policy.mesh, self.queue, lambda: self._publish(partial, final, began)
        )
        self.saved = state.number
        self.finish(wait=wait)

    def finish(self, *, wait: bool) -> None:
        """Complete a save whose files are on disk. With `wait`, block until they are. Collective.

        Raises CheckpointError, on every rank, if the files cannot be written.
        """
        self.queue.maybe_finalize_async_calls(blocking=wait)

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
        """Restore the newest valid checkpoint into the policy. Return None if the folder holds none. Collective.

        Raises:
            CheckpointError: a valid checkpoint belongs to another model, or the policy was changed by checkpoints that
                then turned out to be damaged, and no other one is valid.
        """
        half_read: list[str] = []
        for folder, reason in self.policy.mesh.on_lead(lambda: candidates(self.folder)):
            found = reason
            if found is None:
                try:
                    verified = self._verify(folder)
                    half_read.append(folder.name)
                    return self._load(folder, verified)
                except Unreadable as error:
                    found = str(error)
            self._say(f"checkpoint {folder.name} is not usable ({found}); trying an older one")
        if half_read:
            self.policy.mesh.raise_everywhere(
                CheckpointError(
                    f"no checkpoint in {self.folder} can be read, and {half_read[-1]} has overwritten a part of the "
                    "weights: remove that folder, then --resume"
                )
            )
        return None

    def load(self, number: int) -> TrainState:
        """Restore checkpoint `number` into the policy. Raise CheckpointError if it is not valid. Collective."""
        return self._needed(number, self._load)

    def load_weights(self, number: int) -> None:
        """Load only the model weights of checkpoint `number`, for scoring.

        The optimizer state does not change. Load a whole checkpoint before an update.
        """
        self._needed(number, self._load_weights)

    def _needed(self, number: int, load: Callable[[Path, bool], T]) -> T:
        """Return `load(folder, verified)` of checkpoint `number`. Raise CheckpointError if it is not valid."""
        folder = self.path(number)
        reason = self.policy.mesh.on_lead(lambda: find_defect(folder))
        try:
            if reason is None:
                return load(folder, self._verify(folder))
        except Unreadable as error:
            reason = str(error)
        self.policy.mesh.raise_everywhere(
            CheckpointError(
                f"checkpoint {folder} is needed and not usable: {reason}; restore it from a copy, or remove the folder "
                "and resume from an older one"
            )
        )
        raise AssertionError  # the line above raises

    def _verify(self, folder: Path) -> bool:
        """Compare the files of a checkpoint with their digests, each rank a share of them. Collective.

        Return False if the checkpoint was written without digests. Raise Unreadable, on every rank, for damage.
        """
        mesh, name = self.policy.mesh, folder.name
        listed = self._together(lambda: _readable_list(folder))
        if listed.digests is None:
            self._say(f"checkpoint {name} was written without digests: its content is not verified")
        else:
            began = time.perf_counter()
            own = check_digests(folder, listed, shares(listed.sizes, mesh.world)[mesh.rank])
            checks = mesh.broadcast(mesh.gather(own))
            damage = [reason for check in checks for _, reason in check.damage]
            if damage:
                more = f", and {len(damage) - 1} more files" if len(damage) > 1 else ""
                raise Unreadable(damage[0] + more)
            size, seconds = sum(check.nbytes for check in checks) / 1e9, time.perf_counter() - began
            self._say(
                f"checkpoint {name}: {len(listed.sizes)} files equal their digests "
                f"({size:.3g} GB, {size / seconds:.2g} GB/s)"
            )
        old = self._together(lambda: inspect(folder))
        if old:
            self._say(
                f"checkpoint {name} names the norm before the experts as older versions did: {old} entries are renamed "
                "while loading"
            )
        return listed.digests is not None

    def _together(self, work: Callable[[], T]) -> T:
        """Return `work()` of this rank. Raise the first rank's Unreadable or CheckpointError on every rank."""
        value, failure = None, None
        try:
            value = work()
        except (Unreadable, CheckpointError) as error:
            failure = error
        failures = self.policy.mesh.broadcast(self.policy.mesh.gather(failure))
        self.policy.mesh.raise_everywhere(next((found for found in failures if found is not None), None))
        return value  # type: ignore[return-value]

    def _say(self, line: str) -> None:
        if self.policy.mesh.rank == 0:
            print(line, flush=True)

    def _load_weights(self, folder: Path, verified: bool) -> None:
        def read() -> dict[str, Any]:
            content, _, lacking = read_content(self._models(), folder, verified=verified)
            lacking = {key for key in lacking if not _OWN.match(key)}
            if lacking:
                raise CheckpointError(
                    f"{folder} holds other weights than this model: '{min(lacking)}' is missing there"
                )
            return content

        self._restore_models(self._together(read))

    def _restore_models(self, content: dict[str, Any]) -> None:
        if self.policy.products.unreachable_scales:
            # From 2.18 on, Transformer Engine asks for this before it loads pickled scales. A run resumes from
            # checkpoints of its own.
            os.environ.setdefault("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
        for i, model in enumerate(self.policy.models):
            empty = {name: state for name, state in model.state_dict().items() if _OWN.match(name)}
            model.load_state_dict(empty | content[f"model{i}"])

    def _load(self, folder: Path, verified: bool) -> TrainState:
        content, state = self._together(lambda: self._read(folder, verified))
        self._restore_models(content)
        self.policy.optimizer.load_state_dict(content["optimizer"])
        if "rng" in content:
            torch.set_rng_state(content["rng"]["torch"])
            get_cuda_rng_tracker().set_states(content["rng"]["tracker"])
        self.policy.optimizer.updates = state.updates
        return state

    def _read(self, folder: Path, verified: bool) -> tuple[dict[str, Any], TrainState]:
        """Return the content and the state of a checkpoint. Raise CheckpointError if it is of another model."""
        template = self._content(TrainState(), loading=True)
        content, *differing = read_content(template, folder, verified=verified)
        foreign = sorted(key for keys in differing for key in keys if not _OWN.match(key))
        if foreign:
            raise CheckpointError(
                f"{folder} cannot be loaded into this model and layout: {len(foreign)} entries are on one side only, "
                f"'{foreign[0]}' among them; resume with the model and optimizer settings of the run"
            )
        state = content.get("state")
        if not isinstance(state, dict) or not state.keys() <= {field.name for field in fields(TrainState)}:
            raise Unreadable("common.pt does not hold the state of a run")
        return content, TrainState(**state)

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

    def _begin(self, partial: Path) -> None:
        self.guard()
        _make_empty(partial)

    def _publish(self, partial: Path, final: Path, began: float) -> None:
        """Give a complete checkpoint its final name, and remove old and half-written ones. For rank 0.

        `began` is the unix time at which the save began.
        """
        self.guard()
        # The files may have been on disk long before the step ended in which this is called.
        written = max(path.stat().st_mtime for path in partial.iterdir())
        self.save_s.append(min(max(written - began, 0.0), time.time() - began))
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        sync_folder(self.folder)
        for left in self.folder.glob(f"step_*{PARTIAL}"):  # of a run that was killed
            shutil.rmtree(left)
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


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise StorageError(f"checkpoint {folder} cannot be written: {error.strerror}") from error


def _readable_list(folder: Path) -> FileList:
    try:
        return read_list(folder)
    except (OSError, ValueError) as error:
        raise Unreadable(str(error)) from error
