"""Everything that can be known to fail before a process is started or a byte allocated."""

from transformers import AutoTokenizer

from megatron_rl.algorithms.erpd.settings import make_run_objective, plan_of
from megatron_rl.alp.layer_noise import layer_noise
from megatron_rl.config import Config
from megatron_rl.engines.processes.own_servers import own_servers
from megatron_rl.errors import ConfigError, MegatronRLError, PrecisionError
from megatron_rl.policy.checkpoint_state import newest_valid, what_is_wrong
from megatron_rl.policy.expert_rules import check_experts
from megatron_rl.precision.machine import Machine, this_machine
from megatron_rl.precision.plan import PrecisionPlan
from megatron_rl.precision.plan_checks import PlanReport
from megatron_rl.sampling.rollouts import check_rollouts, stop_token_ids
from megatron_rl.server.quantized_linear import quantizes_inputs
from megatron_rl.tasks import make_task
from megatron_rl.trainer.precision_check import check_precision
from megatron_rl.weights.families import Family, ModelShape
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.name_table import check_folder


def check(config: Config) -> PlanReport:
    """Objective, checkpoint headers, layout and perturbation against the model, the task's data; answers the precision plan.

    Raises ConfigError, CheckpointError, PrecisionError or UserError.
    """
    make_run_objective(config)
    check_rollouts(config)
    family, shape = _check_folder(config)
    check_experts(config, shape)
    layer_noise(config.alp, shape.num_layers)
    report = check_precision(config, family, shape)
    if not config.rollout.urls:
        own_servers(config, report.plan, this_machine().device, 0.0).check()
        check_transport(config, this_machine().device)
    if config.run.attribute_every:
        check_replayable(report.plan)
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
    """Raise ConfigError where a trainer on `device` and servers of our own do not share what the transport goes through."""
    rollout = config.rollout
    if device != "cpu" and rollout.engine == "embedded" and rollout.transport != "disk":
        raise ConfigError(
            f"rollout.transport: {rollout.transport} sends from the trainer's GPU, and embedded servers are on the CPU: take "
            "transport: disk, or engine: sglang"
        )


def _check_folder(config: Config) -> tuple[Family, ModelShape]:
    parallel = config.parallel
    return check_folder(HFFolder(config.model.path), tensor_parallel=parallel.tensor, expert_parallel=parallel.expert)


def check_rank(config: Config, *, attributes: bool = False) -> PlanReport:
    """What every rank checks for itself, whoever started it: the precision plan. Equal on all ranks of one kind.

    attributes: the mismatch is to be attributed.
    """
    try:
        check_rollouts(config)
        report = check_precision(config, *_check_folder(config))
        if attributes:
            check_replayable(report.plan)
        return report
    except MegatronRLError as error:
        error.everywhere = True
        raise


def check_replayable(plan: PrecisionPlan, machine: Machine | None = None) -> None:
    """PrecisionError where the trainer's layers cannot be made to compute without their own recipe. machine: None: this one."""
    if (machine or this_machine()).transformer_engine and (plan.trains_low or quantizes_inputs(plan)):
        raise PrecisionError(
            "the mismatch of quantized products cannot be attributed with Transformer Engine's layers, whose arithmetic cannot "
            f"be taken apart (precision.recipe: {plan.recipe}, engine inputs {plan.engine_inputs}): train with "
            "run.attribute_every: 0, and attribute the run in an environment without transformer-engine"
        )


def check_run_folder(config: Config, *, resume: bool) -> None:
    """Raises ConfigError when the run folder already holds a run that is not to be resumed, or lacks an older student."""
    folder = config.run.folder
    if (folder / "log.jsonl").exists() and not resume:
        raise ConfigError(f"{folder} already holds a run: pass --resume to go on with it, or choose another run.name")
    plan, checkpoints = plan_of(config), folder / "checkpoints"
    new = newest_valid(checkpoints)[0] is None  # step 0 will be written before anybody asks for it
    for j in plan.older_students if plan is not None else ():
        reason = what_is_wrong(checkpoints / f"step_{j:06d}")
        if reason is not None and not (new and j == 0):
            raise ConfigError(
                f"objective.signals: student@{j} is the run's checkpoint after {j} steps, and {checkpoints} has no "
                f"usable one ({reason}): train to that step with another signal and run.steps={j}, then --resume with this one"
            )
