"""Evaluation without training: engines, task, pass rates."""

from contextlib import ExitStack

from megatron_rl.config import Config
from megatron_rl.engines.processes.own_servers import own_servers
from megatron_rl.errors import ConfigError
from megatron_rl.trainer.bringup import open_rollouts
from megatron_rl.trainer.preflight import check_task, resolve_on_rank


def evaluate_model(config: Config) -> dict[str, float]:
    """Print and return held-out pass rates of `config.model.path`, or of the weights on the engines of `rollout.urls`.

    Raises ConfigError if `eval.prompts` is 0.
    """
    if config.eval.prompts == 0:
        raise ConfigError("eval.prompts is 0: set how many held-out problems to evaluate, e.g. eval.prompts=64")
    plan = resolve_on_rank(config, trains=False)
    check_task(config)
    with ExitStack() as stack:
        servers = None
        if config.rollout.own_servers:
            limit_s = config.rollout.start_timeout_s
            first_gpu = plan.placement.first_gpu
            servers = own_servers(config, plan.precision, plan.machine.device, limit_s, first_gpu=first_gpu)
            stack.enter_context(servers)
        rollouts = stack.enter_context(open_rollouts(config, plan.precision, servers))
        rates = rollouts.evaluate(0).rates
    for name, rate in rates.items():
        print(f"{name}: {rate:.1%}")
    return rates
