"""Functions that the ranks of a group run to save a policy, load it under a layout, and make the next update.

The common arguments are described in `tests.parallel.steps`. `folder` holds the checkpoints.
"""

import contextlib
import functools
import io
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_rl.errors import CheckpointError
from megatron_rl.objectives import make_objective
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.checkpoint import Checkpoints, parameter_digest
from megatron_rl.policy.checkpoint_state import TrainState
from megatron_rl.types import Batch
from tests.cases.checkpoints import CASES
from tests.parallel.steps import OBJECTIVE, exported, make_batch, make_policy


def update(policy: Policy, batch: Batch | None = None) -> dict[str, Any]:
    """Make one update with `batch`, or the common one. Return its stats and, on rank 0, the weights after it."""
    objective = make_objective(OBJECTIVE)
    stats = policy.update(batch or make_batch(), objective, objective.norm)
    return {"loss": stats.loss, "grad_norm": stats.grad_norm, "logp": stats.logp, "weights": exported(policy)}


def save_and_go_on(model: Path, layout: dict[str, Any], folder: Path, **sections: Any) -> dict[str, Any]:
    """Make two updates, save a checkpoint, and make a third update.

    Return the saved weights, the next random numbers and the third update.
    """
    policy = make_policy(model, layout, **sections)
    update(policy)
    saved = update(policy)["weights"]
    checkpoints = Checkpoints(folder, policy, keep=2)
    checkpoints.save(TrainState(step=2, version=3, updates=policy.optimizer.updates, seed=9), wait=True)
    checkpoints.close()
    random = torch.rand(4).numpy()
    return {"weights": saved, "random": random, "next": update(policy)}


def load_and_go_on(model: Path, layout: dict[str, Any], folder: Path, **sections: Any) -> dict[str, Any]:
    """Load the newest checkpoint into a new policy and make the next update. Also return what was printed."""
    policy = make_policy(model, layout, **sections)
    torch.manual_seed(1234)
    checkpoints, said = Checkpoints(folder, policy, keep=2), io.StringIO()
    with contextlib.redirect_stdout(said):
        state = checkpoints.load_newest()
    random = torch.rand(4).numpy()
    loaded = exported(policy)
    after = update(policy)
    checkpoints.close()
    return {"state": state, "said": said.getvalue(), "weights": loaded, "random": random, "next": after}


def refused_load(model: Path, layout: dict[str, Any], folder: Path) -> str:
    """Return the error message of loading the newest checkpoint."""
    checkpoints = Checkpoints(folder, make_policy(model, layout), keep=2)
    try:
        checkpoints.load_newest()
    except CheckpointError as error:
        return str(error)
    finally:
        checkpoints.close()
    return "not refused"


def save_each_update(
    model: Path, layout: dict[str, Any], folder: Path, count: int, keep: int
) -> list[dict[str, np.ndarray]]:
    """Make `count` updates with a checkpoint after each. Return the weights of every checkpoint."""
    policy = make_policy(model, layout)
    checkpoints, weights = Checkpoints(folder, policy, keep), []
    for step in range(1, count + 1):
        weights.append(update(policy)["weights"])
        checkpoints.save(TrainState(step=step, version=step + 1, updates=step))
    checkpoints.close()
    return weights


def update_while_saving(
    model: Path, layout: dict[str, Any], folder: Path, gate: Path, **sections: Any
) -> dict[str, Any]:
    """Save a checkpoint whose files are written only after two more updates. Writers wait for the file `gate`."""
    policy = make_policy(model, layout, **sections)
    before = update(policy)["weights"]
    checkpoints = Checkpoints(folder, policy, keep=2)
    with _writers_wait_for(gate):
        checkpoints.save(TrainState(step=1, version=2, updates=1))
    under_way = {"next": update(policy), "after": update(policy)["weights"]}
    checkpoints.finish(wait=False)
    names = sorted(path.name for path in folder.iterdir())
    policy.mesh.barrier()
    gate.touch()
    checkpoints.close()
    return {"weights": before, "names_while_writing": names, **under_way}


@contextlib.contextmanager
def _writers_wait_for(gate: Path) -> Iterator[None]:
    """Make writer processes that are forked inside wait until `gate` exists, as on a slow disk."""
    write_item = filesystem_async._write_item

    @functools.wraps(write_item)
    def patient(*args: Any, **kwargs: Any) -> Any:
        deadline = time.monotonic() + 120
        while not gate.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return write_item(*args, **kwargs)

    filesystem_async._write_item = patient
    try:
        yield
    finally:
        filesystem_async._write_item = write_item


def what_a_save_leaves(model: Path, layout: dict[str, Any], folder: Path, temporary: Path) -> dict[str, Any]:
    """Save a checkpoint. Return what lies in the temporary folder while files are written and after it, and the
    number of processes that still run then."""
    gate, kept = folder.with_name("gate"), tempfile.tempdir
    tempfile.tempdir = str(temporary)
    try:
        checkpoints = Checkpoints(folder, make_policy(model, layout), keep=2)
        before = len(psutil.Process().children())
        with _writers_wait_for(gate):
            checkpoints.save(TrainState(step=1))
        meanwhile = sorted(temporary.iterdir())
        checkpoints.policy.mesh.barrier()
        gate.touch()
        checkpoints.close()
        children = len(psutil.Process().children()) - before
        return {"while writing": meanwhile, "children": children, "after": sorted(temporary.iterdir())}
    finally:
        tempfile.tempdir = kept


def syncs_of_a_save(model: Path, layout: dict[str, Any], folder: Path, record: Path) -> None:
    """Save a checkpoint, and note in `record` every sync of all ranks in order: the name and its bytes at that time."""
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        fsync(descriptor)
        path, size = Path(os.readlink(f"/proc/self/fd/{descriptor}")), os.fstat(descriptor).st_size
        with record.open("ab", buffering=0) as file:
            file.write(json.dumps([path.name, size]).encode() + b"\n")

    with Checkpoints(folder, make_policy(model, layout), keep=2) as checkpoints:
        os.fsync = noting  # writer processes are forked
        try:
            checkpoints.save(TrainState(step=1), wait=True)
        finally:
            os.fsync = fsync


def save_on_a_full_disk(model: Path, layout: dict[str, Any], folder: Path) -> tuple[str, bool, list[str]]:
    """Save a checkpoint whose shards do not fit, then the next one. Return the error, whether it says that every rank
    has it, and what lies in the folder at the end."""
    checkpoints = Checkpoints(folder, make_policy(model, layout), keep=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # like a disk quota: a write fails halfway
    try:
        checkpoints.save(TrainState(step=1), wait=True)
    except CheckpointError as error:
        message, everywhere = str(error), error.everywhere
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.save(TrainState(step=2), wait=True)
    checkpoints.close()
    return message, everywhere, sorted(path.name for path in folder.iterdir())


def save_two(model: Path, layout: dict[str, Any], folder: Path) -> list[dict[str, str]]:
    """Save checkpoints 1 and 2 asynchronously, with other weights. Return the digests of the weights in each."""
    policy = make_policy(model, layout)
    digests = []
    with Checkpoints(folder, policy, keep=2) as checkpoints:
        for step in (1, 2):
            with torch.no_grad():
                for parameter in policy.models[0].parameters():
                    parameter.mul_(1.5)
            checkpoints.save(TrainState(step=step, version=step))
            digests.append(parameter_digest(policy))
    return digests


def resume_after(
    model: Path, layout: dict[str, Any], saved: Path, case: str, scratch: Path
) -> list[tuple[str, int | str, str, dict[str, str]]]:
    """Damage a copy of checkpoint 2 as a case of the table says, once for each of its files, and load the newest one.

    Return for each copy the damaged file, the step of the loaded state or the error, what was printed, and the digests
    of the weights after it.
    """
    policy, found = make_policy(model, layout), []
    for number, name in enumerate(CASES[case].files(saved / "step_000002")):
        folder = scratch / f"{case}-{number}"
        if policy.mesh.rank == 0:
            shutil.copytree(saved, folder)
            CASES[case].damage(folder / "step_000002" / name)
        policy.mesh.barrier()
        said = io.StringIO()
        with contextlib.redirect_stdout(said), Checkpoints(folder, policy, keep=2) as checkpoints:
            try:
                state = checkpoints.load_newest()
                outcome = -1 if state is None else state.step
            except CheckpointError as error:
                outcome = str(error)
        found.append((name, outcome, said.getvalue(), parameter_digest(policy)))
    return found


def start_again(model: Path, layout: dict[str, Any], folder: Path, **sections: Any) -> dict[str, Any]:
    """Save checkpoint 0, make three updates with a checkpoint each, then load checkpoint 0 with a reset optimizer.

    Return the weights after the first two updates: from the first run, again from the same policy, and from a policy
    that never made an update. Also return the digests at 0, after loading 0, and after loading only the weights of 2,
    these weights, and the names that are left on disk.
    """
    policy = make_policy(model, layout, **sections)
    checkpoints = Checkpoints(folder, policy, keep=1, pinned=[0, 2])
    checkpoints.save(TrainState(), wait=True)
    digests, first = [parameter_digest(policy)], []
    for at in range(1, 4):
        first.append(update(policy)["weights"])
        checkpoints.save(TrainState(step=at, updates=at, stage="teacher", stage_updates=at), wait=True)
    checkpoints.load(0)
    digests.append(parameter_digest(policy))
    checkpoints.load_weights(2)
    digests.append(parameter_digest(policy))
    second = exported(policy)
    checkpoints.load(0)
    policy.optimizer.restart()
    again = [update(policy)["weights"] for _ in range(2)]
    checkpoints.close()
    fresh = make_policy(model, layout, **sections)
    other = Checkpoints(folder, fresh, keep=1)
    state = other.load(0)
    other.close()
    afresh = [update(fresh)["weights"] for _ in range(2)]
    names = sorted(path.name for path in folder.iterdir())
    weights = {"first": first[:2], "again": again, "afresh": afresh, "second": second}
    return {**weights, "digests": digests, "names": names, "state": state}
