"""Tasks: prompt sets, their verifiers, and rewards of the user's own."""

from megatron_rl.tasks.arithmetic import ArithmeticTask
from megatron_rl.tasks.end_tokens import strip_end
from megatron_rl.tasks.make_task import TASKS, make_task
from megatron_rl.tasks.math import MathTask
from megatron_rl.tasks.running_total import RunningTotalTask
from megatron_rl.tasks.task import Observation, Task, Turn, encode_plain, prompts_for_step
from megatron_rl.tasks.tool import ToolTask
from megatron_rl.types import Prompt

__all__ = [
    "TASKS",
    "ArithmeticTask",
    "MathTask",
    "Observation",
    "Prompt",
    "RunningTotalTask",
    "Task",
    "ToolTask",
    "Turn",
    "encode_plain",
    "make_task",
    "prompts_for_step",
    "strip_end",
]
