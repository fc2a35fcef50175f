"""Ranks under srun: `srun megatron-rl train` takes RANK and the like from Slurm's variables of the task."""

import os
import socket
from collections.abc import Mapping, MutableMapping

import psutil

from megatron_rl.errors import ConfigError
from megatron_rl.launch.conductor.nodelist import expand_counts, expand_hosts
from megatron_rl.launch.conductor.port_block import pick_block

_NEEDED = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_JOB_ID")


def slurm_rank(environment: Mapping[str, str]) -> dict[str, str]:
    """Return RANK and the other variables of a rank that srun has started; {} for any other process.

    A step of one task is no rank: there the local launcher starts all ranks.

    Args:
        environment: the environment of the process.

    Raises:
        ConfigError: the task is one of several, but Slurm's variables are incomplete.
    """
    if "RANK" in environment or "SLURM_STEP_ID" not in environment:
        return {}
    tasks = environment.get("SLURM_NTASKS", "1")
    if tasks == "1":
        return {}
    missing = [name for name in _NEEDED if not environment.get(name)]
    if missing:
        raise ConfigError(
            f"srun has started {tasks} tasks, but {', '.join(missing)} is not set: start with srun --export=ALL, or "
            "set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT yourself"
        )
    try:
        rank, local, world = (int(environment[name]) for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"))
        hosts = expand_hosts(environment["SLURM_STEP_NODELIST"])
        counts = expand_counts(environment["SLURM_STEP_TASKS_PER_NODE"])
        node = int(environment.get("SLURM_NODEID", "0"))
        port = pick_block(int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"]) + 1, 1)
        found = {
            "RANK": str(rank),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(counts[node]),
            "MASTER_ADDR": hosts[0],
            "MASTER_PORT": str(port),
        }
    except (ValueError, IndexError) as error:
        raise ConfigError(
            f"the variables that srun has set for this task cannot be read ({error}): set RANK, LOCAL_RANK, "
            "WORLD_SIZE, MASTER_ADDR and MASTER_PORT yourself"
        ) from error
    return found | {name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT") if environment.get(name)}


def join_slurm_step(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Set RANK and the like if srun has started this process as one of several tasks. Return whether it has.

    In a step of several nodes, GLOO_SOCKET_IFNAME becomes the interface that leads to another node, unless it is set:
    Debian gives a host's own name the address 127.0.1.1, which gloo would publish to the other nodes.
    """
    found = slurm_rank(environment)
    if not found:
        return False
    environment.update(found)
    hosts = expand_hosts(environment["SLURM_STEP_NODELIST"])
    peers = [host for host in hosts if host != environment.get("SLURMD_NODENAME", socket.gethostname())]
    name = interface_towards(peers[0]) if len(hosts) > 1 and peers else None
    if name is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", name)
    return True


def interface_towards(host: str) -> str | None:
    """Return the network interface from which this machine reaches a host; None if there is no route."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == own for one in addresses):
            return name
    return None
