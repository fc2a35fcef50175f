"""Preflight: checks that run before a process is started or memory is allocated."""

from contextlib import closing

from transformers import AutoTokenizer

from megatron_rl.attribution.limits import check_replayable
from megatron_rl.config import Config
from megatron_rl.errors import ConfigError, MegatronRLError
from megatron_rl.loggers import check_loggers
from megatron_rl.plan import RunPlan, plan_algorithm, resolve_run
from megatron_rl.policy.checkpoint_files import find_defect
from megatron_rl.policy.checkpoint_state import newest_valid
from megatron_rl.sampling.rollouts import stop_token_ids
from megatron_rl.tasks import make_task
from megatron_rl.tasks.make_reward import make_reward
from megatron_rl.trainer.code_record import check_code


def check(config: Config) -> RunPlan:
    """Check everything that can be checked on one machine, with the task's data and the tokenizer. Return the plan.

    Raises ConfigError, CheckpointError, PrecisionError or UserError.
    """
    plan = resolve_run(config)
    check_loggers(config.run.loggers)
    stop_token_ids(config.model.path)
    check_task(config)
    return plan


def check_task(config: Config) -> None:
    """Check the task, its data and its reward. Raise ConfigError or UserError."""
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    longest = config.rollout.max_prompt_tokens
    with closing(make_task(config.task, tokenizer, seed=config.run.seed, max_prompt_tokens=longest)) as task:
        make_reward(config.task, task).close()


def resolve_on_rank(config: Config, *, attributes: bool = False) -> RunPlan:
    """Return the plan, resolved on this rank under any launcher.

    The result is equal on all ranks with the same kind of machine. If `attributes`, also check that the mismatch can be
    attributed. Errors have `everywhere` set.
    """
    try:
        plan = resolve_run(config)
        if attributes:
            check_replayable(plan.precision, plan.machine)
        return plan
    except MegatronRLError as error:
        error.everywhere = True
        raise


def check_run_folder(config: Config, *, resume: bool, accept_changed_code: bool = False) -> None:
    """Check that a run can start in its folder, or resume there.

    Args:
        config: the resolved configuration.
        resume: continue the run that the folder holds.
        accept_changed_code: do not compare the user's own code with what the run used before.

    Raises:
        ConfigError: the folder holds a run and `resume` is False, the user's own code has changed, or a required
            checkpoint is missing.
    """
    if accept_changed_code and not resume:
        raise ConfigError("--accept-changed-code is about a run that goes on: pass it together with --resume")
    if resume and not accept_changed_code:
        check_code(config)
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
