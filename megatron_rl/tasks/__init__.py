"""Tasks: prompt sets and their verifiers."""

from typing import TYPE_CHECKING

from megatron_rl.config import TaskConfig
from megatron_rl.tasks.arithmetic import ArithmeticTask
from megatron_rl.tasks.math import MathTask
from megatron_rl.tasks.task import Task, prompts_for_step
from megatron_rl.tasks.tool import ToolTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["ArithmeticTask", "MathTask", "Task", "ToolTask", "make_task", "prompts_for_step"]


def make_task(config: TaskConfig, tokenizer: "PreTrainedTokenizerFast", *, seed: int, max_prompt_tokens: int) -> Task:
    """Return the task of a configuration, with its data read and checked.

    Args:
        config: its `name` selects the task: `math`, `tool` or arithmetic.
        tokenizer: tokenizes the prompts.
        seed: seed of the shuffle of generated problems; tasks that only read a file do not use it.
        max_prompt_tokens: a prompt with more tokens is an error.

    Raises:
        ConfigError, UserError: the configuration or the data cannot be used.
    """
    if config.name == "math":
        return MathTask(config, tokenizer, max_prompt_tokens=max_prompt_tokens)
    if config.name == "tool":
        return ToolTask(config, tokenizer, seed=seed, max_prompt_tokens=max_prompt_tokens)
    return ArithmeticTask(config, tokenizer, seed=seed, max_prompt_tokens=max_prompt_tokens)
