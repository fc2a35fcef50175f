"""Evaluation without training: engines, task, pass rates."""

from contextlib import ExitStack

from megatron_rl.config import Config
from megatron_rl.errors import ConfigError
from megatron_rl.training.run import embedded_servers, open_rollouts


def evaluate_model(config: Config) -> dict[str, float]:
    """Print and answer the held-out pass rates of `config.model.path`, or of the weights that `rollout.urls` serve.

    Raises ConfigError when `eval.prompts` is 0.
    """
    if config.eval.prompts == 0:
        raise ConfigError("eval.prompts is 0: say how many held-out problems to evaluate, e.g. eval.prompts=64")
    with ExitStack() as stack:
        urls = config.rollout.urls or stack.enter_context(embedded_servers(config)).urls
        rollouts = stack.enter_context(open_rollouts(config, list(urls), need_logmu=False))
        rates = rollouts.evaluate(0)
    for name, rate in rates.items():
        print(f"{name}: {rate:.1%}")
    return rates
