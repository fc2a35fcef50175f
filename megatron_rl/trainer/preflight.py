"""Preflight: checks that run before a process is started or memory is allocated."""

from contextlib import closing

from megatron_rl.attribution.limits import check_replayable
from megatron_rl.config import Config
from megatron_rl.errors import MegatronRLError
from megatron_rl.loggers import check_loggers
from megatron_rl.plan import RunPlan, resolve_run
from megatron_rl.tasks import make_task
from megatron_rl.tasks.end_tokens import stop_token_ids
from megatron_rl.tasks.make_reward import make_reward
from megatron_rl.tasks.templates import load_tokenizer


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
    """Check the task, its data and its reward, and print what was read. Raise ConfigError or UserError."""
    tokenizer = load_tokenizer(config.model.path)
    longest = config.rollout.max_prompt_tokens
    with closing(make_task(config.task, tokenizer, seed=config.run.seed, max_prompt_tokens=longest)) as task:
        make_reward(config.task, task).close()
        if task.summary:
            print(task.summary, flush=True)


def resolve_on_rank(config: Config, *, attributes: bool = False, trains: bool = True) -> RunPlan:
    """Return the plan, resolved on this rank under any launcher.

    The result is equal on all ranks with the same kind of machine. If `attributes`, also check that the mismatch can be
    attributed. Unless `trains`, no rank uses a GPU. Errors have `everywhere` set.
    """
    try:
        plan = resolve_run(config, trains=trains)
        if attributes:
            check_replayable(plan.precision, plan.machine)
        return plan
    except MegatronRLError as error:
        error.everywhere = True
        raise
