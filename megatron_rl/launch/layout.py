"""Which role runs on which node: a pure function of the mode, the sizes and the profile."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from megatron_rl.errors import ConfigError
from megatron_rl.launch.conductor.decide import TRAINER
from megatron_rl.launch.profile import Profile

Mode = Literal["colocated", "split", "het", "local"]
MODES: tuple[Mode, ...] = ("colocated", "split", "het")


@dataclass(frozen=True)
class Role:
    """One step of a job.

    Attributes:
        name: name of the step, such as engine-0.
        kind: trainer or engine.
        group: number of the group of nodes; only mode het has a second one.
        first_node: number of the first node in the group.
        nodes: number of nodes.
        tasks: number of tasks on all nodes.
        local: number of the engine on its node.
        gpus: GPUs on each node.
        overlap: the step shares its nodes with another step.
    """

    name: str
    kind: Literal["trainer", "engine"]
    group: int
    first_node: int
    nodes: int
    tasks: int
    local: int = 0
    gpus: int = 0
    overlap: bool = False


@dataclass(frozen=True)
class JobLayout:
    """The nodes of each group, and the roles on them."""

    mode: Mode
    groups: tuple[int, ...]
    roles: tuple[Role, ...] = field(default=())
    spares: int = 0  # last nodes of the last group, for engines of lost nodes

    @property
    def nodes(self) -> int:
        """Number of nodes of the job."""
        return sum(self.groups)

    @property
    def engines(self) -> tuple[Role, ...]:
        """The roles that are engines."""
        return tuple(role for role in self.roles if role.kind == "engine")

    def as_json(self) -> list[dict[str, Any]]:
        """Return the roles as plain values."""
        return [asdict(role) for role in self.roles]


def make_layout(mode: Mode, ranks: int, engines: int, gpus_per_engine: int, nodes: int | None, p: Profile) -> JobLayout:
    """Return the roles of a job.

    Args:
        mode: colocated: engines on the trainer's nodes; split: on nodes of their own; het: on nodes of a second group.
        ranks: ranks of the trainer.
        engines: number of engines; with `nodes`, as many as the other nodes hold.
        gpus_per_engine: GPUs of one engine; 0: it uses none.
        nodes: nodes of the job, spare ones included; None: as many as ranks and engines need, and the spare ones.
        p: the profile.

    Raises:
        ConfigError: ranks or engines do not fit on whole nodes, or the number of nodes is another.
    """
    trainer_nodes = _whole_nodes(ranks, p.ranks)
    engine_gpus = p.gpus_per_node if mode != "het" or p.rollout.gpus_per_node is None else p.rollout.gpus_per_node
    per_node = _engines_per_node(gpus_per_engine, engine_gpus, p)
    if mode == "colocated":
        if p.spare_nodes:
            raise ConfigError("spare_nodes: colocated engines live and die with the trainer's nodes: remove it")
        if nodes is not None and nodes != trainer_nodes:
            raise ConfigError(f"--nodes {nodes}: {ranks} ranks need {trainer_nodes} nodes with {p.ranks} ranks each")
        engine_nodes = trainer_nodes
        engines = trainer_nodes * per_node
    elif nodes is None:
        engine_nodes = -(-engines // per_node)
    else:
        engine_nodes = nodes - trainer_nodes - p.spare_nodes
        if engine_nodes < 1:
            raise ConfigError(
                f"--nodes {nodes}: mode {mode} needs {trainer_nodes} for {ranks} ranks and at least 1 for engines"
                f"{f', beside {p.spare_nodes} spare_nodes' * bool(p.spare_nodes)}: raise it, lower parallel.data, or "
                "take --mode colocated"
            )
        engines = engine_nodes * per_node
    shared = mode == "colocated"
    overlap = shared or per_node > 1
    trainer = Role(TRAINER, "trainer", 0, 0, trainer_nodes, ranks, gpus=p.gpus_per_node, overlap=shared)
    group, first = (1, 0) if mode == "het" else (0, 0 if shared else trainer_nodes)
    roles = [
        Role(
            f"engine-{i}",
            "engine",
            group,
            first + i // per_node,
            1,
            1,
            i % per_node,
            engine_gpus,
            overlap,
        )
        for i in range(engines)
    ]
    others = 0 if shared else engine_nodes + p.spare_nodes
    groups = (trainer_nodes, others) if mode == "het" else (trainer_nodes + others,)
    return JobLayout(mode, groups, (*roles, trainer), p.spare_nodes)


def _whole_nodes(ranks: int, per_node: int) -> int:
    if ranks > per_node and ranks % per_node:
        raise ConfigError(
            f"parallel: tensor x pipeline x context x data = {ranks} ranks do not fill nodes of {per_node} ranks: "
            "change parallel.data, or ranks_per_node of the profile"
        )
    return max(1, ranks // per_node)


def _engines_per_node(gpus_per_engine: int, gpus: int, p: Profile) -> int:
    fits = max(1, gpus // gpus_per_engine) if gpus_per_engine else 1
    if gpus_per_engine > gpus:
        raise ConfigError(
            f"rollout.sglang.tensor is {gpus_per_engine}, but a node has {gpus} GPUs: engines across nodes are planned"
        )
    if p.engines_per_node is not None and gpus_per_engine and p.engines_per_node > fits:
        raise ConfigError(f"engines_per_node is {p.engines_per_node}, but the GPUs of a node hold {fits} engines")
    return p.engines_per_node or fits


def check_tensor_groups(tensor: int, p: Profile) -> None:
    """Check that a tensor-parallel group lies inside a node, where links are fast. Clusters without GPUs are exempt.

    Raises:
        ConfigError: it does not.
    """
    if p.gpus_per_node and p.ranks > 1 and (tensor > p.ranks or p.ranks % tensor):
        raise ConfigError(
            f"parallel.tensor is {tensor}, and a node holds {p.ranks} ranks: a tensor-parallel group would lie across "
            "nodes; choose a divisor of the ranks of a node"
        )
