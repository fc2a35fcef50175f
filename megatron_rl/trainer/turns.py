"""Turns of trainer and engines that share GPUs (`rollout.colocate`): at most one of them holds its memory."""

from collections.abc import Callable
from typing import Protocol

from megatron_rl.policy.parallel import Mesh
from megatron_rl.trainer.lead import Lead


class Memory(Protocol):
    """Memory of the trainer that can be freed; see `policy.trainer_memory.TrainerMemory`."""

    @property
    def held(self) -> bool:
        """Whether the device holds the memory."""
        ...

    def release(self) -> int:
        """Free the memory, and return its size in bytes."""
        ...

    def restore(self) -> None:
        """Allocate the memory again."""
        ...


class Turns:
    """Gives the GPUs to the trainer or to the engines. Every method is collective.

    The run begins with both in memory: an engine loads its weights while the policy is built.
    """

    def __init__(self, mesh: Mesh, memory: Memory, on_lead: Callable[[Callable[[Lead], None]], None]) -> None:
        """Set whose turns these are; nothing is freed.

        Args:
            mesh: the parallel layout.
            memory: the trainer's memory on this rank.
            on_lead: runs a function on rank 0.
        """
        self._mesh, self._memory, self._on_lead = mesh, memory, on_lead
        self._engines_hold, self._said = True, False

    @property
    def trainer_is_ready(self) -> bool:
        """Whether the trainer can update or save: it holds its memory."""
        return self._memory.held

    def to_trainer(self) -> None:
        """Let the engines release their memory, then give the trainer its own."""
        if self._engines_hold:
            self._on_lead(Lead.offload_engines)
            self._engines_hold = False
        self._memory.restore()

    def to_engines(self) -> None:
        """Free the trainer's memory, then let the engines allocate theirs. They generate after the next publish."""
        freed = self._memory.release()
        self._mesh.barrier()  # the memory of every rank is free before an engine takes it
        if not self._engines_hold:
            self._on_lead(Lead.reload_engines)
            self._engines_hold = True
        if freed and not self._said and self._mesh.rank == 0:
            print(f"colocation: rank 0 frees {freed / 2**30:.3g} GiB while engines generate", flush=True)
        self._said = True
