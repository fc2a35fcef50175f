"""Evaluation without training: engines, task, pass rates."""

from megatron_rl.config import Config
from megatron_rl.errors import ConfigError
from megatron_rl.training.run import embedded_servers, open_rollouts


def evaluate_model(config: Config) -> dict[str, float]:
    """Print and answer the held-out pass rates of `config.model.path`. Raises ConfigError when `eval.prompts` is 0."""
    if config.eval.prompts == 0:
        raise ConfigError("eval.prompts is 0: say how many held-out problems to evaluate, e.g. eval.prompts=64")
    with embedded_servers(config) as servers, open_rollouts(config, list(servers.urls), need_logmu=False) as rollouts:
        rates = rollouts.evaluate(0)
    for name, rate in rates.items():
        print(f"{name}: {rate:.1%}")
    return rates
