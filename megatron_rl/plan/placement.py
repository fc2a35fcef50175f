"""Placement: the GPUs of every rank and every engine of one machine. It is checked before anything starts."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rl.config import Config
from megatron_rl.errors import ConfigError
from megatron_rl.precision.machine import Machine


@dataclass(frozen=True)
class Placement:
    """Numbers of GPUs, as processes of this machine see them. Both are empty where nothing uses a GPU.

    Attributes:
        ranks: GPU of each rank on this machine.
        engines: GPUs of each engine that this run starts.
    """

    ranks: tuple[int, ...] = ()
    engines: tuple[tuple[int, ...], ...] = ()

    @property
    def first_gpu(self) -> int:
        """The first GPU of the first engine; 0 without engines on GPUs."""
        return self.engines[0][0] if self.engines else 0

    @property
    def engine_gpus(self) -> int:
        """The number of GPUs that engines have and ranks of this machine do not."""
        return len({gpu for gpus in self.engines for gpu in gpus} - set(self.ranks))

    def __str__(self) -> str:
        """Return the GPUs as text, empty without any."""
        parts = [f"ranks on GPUs {_span(self.ranks)}"] if self.ranks else []
        parts += [f"engines on GPUs {', '.join(_span(gpus) for gpus in self.engines)}"] if self.engines else []
        return "; ".join(parts)


def ranks_here(config: Config, machine: Machine, environment: Mapping[str, str]) -> int:
    """Return how many ranks share the GPUs that this process sees.

    Args:
        config: the resolved configuration.
        machine: the machine.
        environment: variables of this process; RANK is among them inside a rank.
    """
    if "RANK" not in environment:
        return config.parallel.world_size  # the local launcher starts all of them here
    if machine.gpus == 1:
        return 1  # the launcher shows every rank a GPU of its own; joined ranks compare their GPUs
    # A launcher that does not set the number of local ranks has started at least those up to this one.
    return int(environment.get("LOCAL_WORLD_SIZE") or int(environment.get("LOCAL_RANK", "0")) + 1)


def place(config: Config, machine: Machine, ranks: int) -> Placement:
    """Return the GPUs of ranks and engines on this machine.

    Ranks take the first GPUs. Engines follow from `rollout.sglang.first_gpu` on, or after the ranks.

    Args:
        config: the resolved configuration.
        machine: the machine.
        ranks: number of ranks on it; 0 if nothing is trained.

    Raises:
        ConfigError: there are too few GPUs, or an engine would be on the GPU of a rank without `rollout.colocate`.
    """
    rollout, sglang = config.rollout, config.rollout.sglang
    if machine.capability is None:
        return Placement()
    if ranks > machine.gpus:
        raise ConfigError(
            f"parallel: {ranks} ranks on this machine need a GPU each, and torch sees {_gpus(machine.gpus)}: lower "
            "tensor x pipeline x context x data, start ranks on several machines, or hide the GPUs "
            "(CUDA_VISIBLE_DEVICES=)"
        )
    if not rollout.own_servers or rollout.engine == "embedded":
        return Placement(tuple(range(ranks)))
    first = sglang.first_gpu
    if first is None:
        first = 0 if rollout.colocate else ranks
    engines = tuple(
        tuple(range(first + i * sglang.tensor, first + (i + 1) * sglang.tensor)) for i in range(rollout.servers)
    )
    placed, last = Placement(tuple(range(ranks)), engines), engines[-1][-1]
    if last >= machine.gpus:
        raise ConfigError(
            f"rollout: {rollout.servers} servers x sglang.tensor {sglang.tensor} from GPU {first} on need GPUs up to "
            f"number {last}, and torch sees {_gpus(machine.gpus)}{f', {ranks} of them for ranks' if ranks else ''}: "
            "lower servers or sglang.tensor, name running servers in rollout.urls, or share the GPUs in turns "
            "(rollout.colocate: true)"
        )
    if first < ranks and not rollout.colocate:
        raise ConfigError(
            f"rollout.sglang.first_gpu is {first}, and the ranks of the trainer have GPUs {_span(placed.ranks)}: set "
            f"it to {ranks} or leave it out, or share the GPUs in turns (rollout.colocate: true)"
        )
    return placed


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _span(gpus: tuple[int, ...]) -> str:
    return str(gpus[0]) if len(gpus) == 1 else f"{gpus[0]}-{gpus[-1]}"
