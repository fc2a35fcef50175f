"""make_reward: returns what rewards the responses of a run."""

from megatron_rl.config import TaskConfig
from megatron_rl.plugins import is_import_path, source_place
from megatron_rl.tasks.remote_reward import RemoteReward
from megatron_rl.tasks.reward import CalledReward, Reward, Verifier, load_reward
from megatron_rl.tasks.task import Task


def make_reward(config: TaskConfig, task: Task) -> Reward:
    """Return the reward of a configuration. Starts nothing until the first response.

    Args:
        config: its `reward` names it; without one, it is the task's verifier.
        task: the task. If its class is the user's own, its verifier has the limits of a reward of the user's own.

    Raises:
        ConfigError: the function does not exist or cannot be called.
    """
    if config.reward is None:
        if not is_import_path(config.name):
            return Verifier(task)
        place = f"task.name {type(task).__name__}.verify ({source_place(type(task).verify)})"
        return CalledReward(config, lambda prompt, response: task.verify(prompt, response.text), place)
    if is_import_path(config.reward):
        return load_reward(config, config.reward)
    return RemoteReward(config, config.reward)
