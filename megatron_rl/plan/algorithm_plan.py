"""The algorithm of a run, resolved from the `objective` and `alp` sections: what it needs, and what it keeps."""

from dataclasses import dataclass

from megatron_rl.alp.layer_noise import alp_objective, check_ratio
from megatron_rl.config import Config
from megatron_rl.errors import ConfigError
from megatron_rl.objectives import LossNorm, Objective
from megatron_rl.objectives.opd import OPD
from megatron_rl.plan.erpd_plan import NAME, ERPDPlan, make_plan


@dataclass(frozen=True)
class AlgorithmPlan:
    """The algorithm of a run, with the properties that other parts of the run use.

    Attributes:
        objective: the objective whose needs decide what the engines report; with ERPD the student's.
        erpd: the plan of an ERPD round; None for an ordinary policy gradient.
        colocated: trainer and engines use the same GPUs in turns.
    """

    objective: Objective
    erpd: ERPDPlan | None = None
    colocated: bool = False

    @property
    def norm(self) -> LossNorm:
        """The denominators of the objective's loss."""
        assert self.objective.norm is not None  # every objective sets it in its constructor
        return self.objective.norm

    @property
    def topk(self) -> int:
        """Number of most likely tokens that engines report at every position; 0: none."""
        return self.objective.topk

    @property
    def needs_reference(self) -> bool:
        """Whether an objective compares with the reference policy."""
        return any("logref" in objective.needs for objective in self.objectives)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """Every objective that the run trains with."""
        return (self.objective,) if self.erpd is None else (self.objective, self.erpd.teacher_objective())

    @property
    def offloads_engines(self) -> bool:
        """Whether engines release their memory while the trainer learns."""
        return self.erpd is not None or self.colocated

    @property
    def older_checkpoints(self) -> tuple[int, ...]:
        """Steps of the run whose checkpoints are never deleted, in ascending order."""
        return () if self.erpd is None else self.erpd.older_students


def plan_algorithm(config: Config) -> AlgorithmPlan:
    """Resolve the algorithm of a configuration.

    Raises:
        ConfigError: a key is illegal, or sections contradict each other.
    """
    if config.objective.name != NAME:
        plan = AlgorithmPlan(alp_objective(config.alp, config.objective.spec()), colocated=config.rollout.colocate)
        return _checked(config, plan)
    rounds = make_plan(config.objective.spec())
    check_ratio(config.alp, type(rounds.teacher_objective()), "objective.teacher")
    if config.alp.enabled and config.alp.level is not None:
        raise ConfigError(
            f"alp.level is set, but {NAME} has two objectives: give the level in objective.teacher, objective.student"
        )
    return _checked(config, AlgorithmPlan(rounds.student_objective(), rounds))


def _checked(config: Config, plan: AlgorithmPlan) -> AlgorithmPlan:
    _check_offloading(config, plan)
    _check_reference(config, plan)
    return plan


def _check_reference(config: Config, plan: AlgorithmPlan) -> None:
    """Raise ConfigError for a teacher that is missing or teaches nothing, or a reference that nothing needs."""
    folder = config.model.reference
    if folder is not None and not plan.needs_reference:
        raise ConfigError(
            f"model.reference is set, but objective {config.objective.name} compares with no reference: leave it out, "
            "or set objective.kl_coef above 0, or objective.name: opd"
        )
    if not any(isinstance(objective, OPD) for objective in plan.objectives):
        return
    if folder is None:
        raise ConfigError("objective opd needs a teacher: set model.reference to its folder")
    if folder.resolve() == config.model.path.resolve():
        raise ConfigError(
            f"model.reference is model.path ({folder}), and objective opd learns nothing from a teacher that the "
            "student is already: give another folder"
        )


def _check_offloading(config: Config, plan: AlgorithmPlan) -> None:
    """Raise ConfigError for keys that need engines while they are offloaded."""
    rollout, name = config.rollout, config.objective.name
    if not plan.offloads_engines:
        return
    if rollout.colocate and plan.erpd is not None:
        raise ConfigError(
            f"rollout.colocate: true does not go with objective.name: {name} yet, whose rounds offload the engines "
            "themselves, and keep the trainer's memory: set it to false"
        )
    cause = "rollout.colocate: true" if rollout.colocate else f"objective.name: {name}"
    if rollout.colocate and rollout.transport == "distributed":
        raise ConfigError(
            "rollout.transport: distributed needs one GPU for each member of the broadcast, and rollout.colocate: true "
            "has trainer and engines share them: take transport: tensor or disk"
        )
    if config.run.attribute_every:
        raise ConfigError(
            f"run.attribute_every does not go with {cause}: the engines are offloaded while the trainer "
            "learns: set it to 0, and use `megatron-rl attribute` on the run's folder"
        )
    if rollout.oversample > 1:
        raise ConfigError(
            f"rollout.oversample: {rollout.oversample} leaves requests to be ended when a step has its groups, and "
            f"{cause} offloads the engines then: set it to 1"
        )
    if rollout.max_staleness:
        raise ConfigError(
            f"rollout.max_staleness: {rollout.max_staleness} does not go with {cause}: a step learns from what its "
            "own policy has sampled, while the engines are offloaded: set it to 0"
        )
