"""Preflight: checks that run before a process is started or memory is allocated."""

from transformers import AutoTokenizer

from megatron_rl.alp.layer_noise import layer_noise
from megatron_rl.attribution.limits import check_replayable
from megatron_rl.config import Config
from megatron_rl.engines.processes.own_servers import own_servers
from megatron_rl.errors import ConfigError, MegatronRLError
from megatron_rl.loggers import check_loggers
from megatron_rl.plan import plan_algorithm
from megatron_rl.policy.checkpoint_state import find_defect, newest_valid
from megatron_rl.policy.expert_rules import check_experts
from megatron_rl.precision.machine import this_machine
from megatron_rl.precision.plan_checks import PlanReport
from megatron_rl.sampling.rollouts import stop_token_ids
from megatron_rl.tasks import make_task
from megatron_rl.trainer.precision_check import check_precision
from megatron_rl.weights.families import Family, ModelShape
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.name_table import check_folder


def check(config: Config) -> PlanReport:
    """Check objective, loggers, checkpoint headers, layout, noise and the task's data, and return the precision plan.

    Raises ConfigError, CheckpointError, PrecisionError or UserError.
    """
    plan = plan_algorithm(config)
    check_loggers(config.run.loggers)
    family, shape = _check_folder(config)
    check_experts(config, shape)
    layer_noise(config.alp, shape.num_layers)
    report = check_precision(config, family, shape)
    if not config.rollout.urls:
        own_servers(config, report.plan, this_machine().device, 0.0, offloads=plan.offloads_engines).check()
        check_transport(config, this_machine().device)
    if config.run.attribute_every:
        check_replayable(report.plan, this_machine())
    stages = config.parallel.pipeline * config.parallel.virtual_pipeline
    if shape.num_layers % stages:
        raise ConfigError(
            f"parallel.pipeline x parallel.virtual_pipeline = {stages} does not divide {shape.num_layers} layers"
        )
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    if longest > shape.max_position_embeddings:
        raise ConfigError(
            f"rollout.max_prompt_tokens + rollout.max_new_tokens = {longest} exceeds the model's "
            f"max_position_embeddings = {shape.max_position_embeddings}"
        )
    stop_token_ids(config.model.path)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    make_task(config.task, tokenizer, seed=config.run.seed, max_prompt_tokens=config.rollout.max_prompt_tokens).close()
    return report


def check_transport(config: Config, device: str) -> None:
    """Raise ConfigError if the transport cannot connect a trainer on `device` with this run's own servers."""
    rollout = config.rollout
    if device != "cpu" and rollout.engine == "embedded" and rollout.transport != "disk":
        raise ConfigError(
            f"rollout.transport: {rollout.transport} sends from the trainer's GPU, and embedded servers are on the "
            "CPU: take transport: disk, or engine: sglang"
        )


def _check_folder(config: Config) -> tuple[Family, ModelShape]:
    parallel = config.parallel
    return check_folder(HFFolder(config.model.path), tensor_parallel=parallel.tensor, expert_parallel=parallel.expert)


def check_rank(config: Config, *, attributes: bool = False) -> PlanReport:
    """Check the precision plan on this rank, under any launcher, and return it.

    The result is equal on all ranks with the same kind of machine. If `attributes`, also check that the mismatch can be
    attributed. Errors have `everywhere` set.
    """
    try:
        report = check_precision(config, *_check_folder(config))
        if attributes:
            check_replayable(report.plan, this_machine())
        return report
    except MegatronRLError as error:
        error.everywhere = True
        raise


def check_run_folder(config: Config, *, resume: bool) -> None:
    """Raise ConfigError if the run folder holds a run and `resume` is False, or if a required checkpoint is missing."""
    folder = config.run.folder
    if (folder / "log.jsonl").exists() and not resume:
        raise ConfigError(f"{folder} already holds a run: pass --resume to go on with it, or choose another run.name")
    checkpoints = folder / "checkpoints"
    new = newest_valid(checkpoints)[0] is None  # a new run writes step 0 before it is needed
    for j in plan_algorithm(config).older_checkpoints:
        reason = find_defect(checkpoints / f"step_{j:06d}")
        if reason is not None and not (new and j == 0):
            raise ConfigError(
                f"objective.signals: student@{j} is the run's checkpoint after {j} steps, and {checkpoints} has no "
                f"usable one ({reason}): train to that step with another signal and run.steps={j}, "
                "then --resume with this one"
            )
