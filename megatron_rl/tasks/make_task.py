"""make_task: builds the task of a configuration, built in or the user's own class."""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from megatron_rl.config import TaskConfig
from megatron_rl.errors import ConfigError, MegatronRLError, did_you_mean
from megatron_rl.plugins import accepted_names, is_import_path, load_plugin, raised_place, source_place
from megatron_rl.tasks.arithmetic import ArithmeticTask
from megatron_rl.tasks.math import MathTask
from megatron_rl.tasks.running_total import RunningTotalTask
from megatron_rl.tasks.task import Task
from megatron_rl.tasks.tool import ToolTask
from megatron_rl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TASKS: dict[str, type[Task]] = {
    "arithmetic": ArithmeticTask,
    "running_total": RunningTotalTask,
    "math": MathTask,
    "tool": ToolTask,
}
# How the methods of a task are called; a user's own class must take these arguments.
_CALLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "verify": (("prompt", "response"), ()),
    "observe": (("prompt", "turn"), ("last",)),
    "solution": (("prompt",), ()),
    "demonstration": (("prompt",), ()),
    "close": ((), ()),
}


def make_task(config: TaskConfig, tokenizer: "PreTrainedTokenizerFast", *, seed: int, max_prompt_tokens: int) -> Task:
    """Return the task of a configuration, with its data read and checked.

    The constructor of a task takes any of `config`, `options`, `tokenizer`, `seed` and `max_prompt_tokens`, by name.

    Args:
        config: its `name` selects the task; `options` are checked by the model `Options` of the class.
        tokenizer: tokenizes the prompts.
        seed: seed of the shuffle of generated problems, unless `config.split_seed` is set; tasks that only read a file
            do not use it.
        max_prompt_tokens: a prompt with more tokens is an error.

    Raises:
        ConfigError, UserError: the configuration, the class or the data cannot be used.
    """
    kind = _task_class(config.name)
    given = {
        "config": config,
        "options": _checked_options(kind, config),
        "tokenizer": tokenizer,
        "seed": seed if config.split_seed is None else config.split_seed,
        "max_prompt_tokens": max_prompt_tokens,
    }
    arguments = {name: given[name] for name in accepted_names(kind, given, "task.name")}
    if not is_import_path(config.name):
        return kind(**arguments)
    try:
        task = kind(**arguments)
    except MegatronRLError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(
            f"task.name: {_named(kind)} raised {type(error).__name__}: {error} ({raised_place(error)})"
        ) from error
    _check_problems(task, kind)
    return task


def _task_class(name: str) -> type[Task]:
    """Return the class of a task. Raise ConfigError if the user's own class lacks a method or an argument."""
    if not is_import_path(name):
        return TASKS[name]
    kind: Any = load_plugin(name, "task.name")
    if not isinstance(kind, type):
        raise ConfigError(f"task.name: {name} ({source_place(kind)}) is no class; give a subclass of tasks.Task")
    for method, (positional, by_name) in _CALLS.items():
        call = getattr(kind, method, None)
        if not callable(call) or getattr(call, "__isabstractmethod__", False):
            raise ConfigError(
                f"task.name: {_named(kind)} has no method '{method}({', '.join((*positional, *by_name))})'; "
                "derive it from megatron_rl.tasks.Task, which needs only verify"
            )
        try:
            inspect.signature(call).bind(None, *positional, **dict.fromkeys(by_name))
        except TypeError as error:
            raise ConfigError(
                f"task.name: {kind.__name__}.{method} ({source_place(call)}) cannot be called with "
                f"({', '.join((*positional, *(f'{name}=...' for name in by_name)))}): {error}"
            ) from error
        if inspect.iscoroutinefunction(call):
            raise ConfigError(
                f"task.name: {kind.__name__}.{method} ({source_place(call)}) is async; only task.reward may be"
            )
    return kind


def _checked_options(kind: type[Task], config: TaskConfig) -> BaseModel | None:
    model = getattr(kind, "Options", None)
    if model is None:
        if config.options:
            raise ConfigError(
                f"task.options has {', '.join(config.options)}, but task.name: {config.name} declares no options; "
                "a class of your own declares them as `Options`, a pydantic model"
            )
        return None
    if not inspect.isclass(model) or not issubclass(model, BaseModel):
        raise ConfigError(f"task.name: {_named(kind)}: Options is {model!r}; it must be a pydantic BaseModel")
    known = [field.alias or name for name, field in model.model_fields.items()]
    for key in config.options:
        if key not in known and model.model_config.get("extra") != "allow":
            raise ConfigError(f"unknown key 'task.options.{key}'; {did_you_mean(key, known)}")
    try:
        return model(**config.options)
    except ValidationError as error:
        raise ConfigError("; ".join(_option_error(item) for item in error.errors())) from error


def _option_error(item: Any) -> str:
    key = ".".join(("task.options", *map(str, item["loc"])))
    if item["type"] == "missing":
        return f"key '{key}' is missing and has no default"
    return f"'{key}' is {item['input']!r}: {item['msg']}"


def _check_problems(task: Any, kind: type[Task]) -> None:
    """Raise ConfigError if the user's own task lacks its problems, or has malformed ones."""
    for name in ("train", "held_out"):
        problems = getattr(task, name, None)
        if not isinstance(problems, Sequence):
            raise ConfigError(
                f"task.name: {_named(kind)} has '{name}' {problems!r}; set it to a sequence of Prompt in __init__"
            )
        if len(problems) and not isinstance(problems[0], Prompt):
            raise ConfigError(
                f"task.name: {_named(kind)} has a {type(problems[0]).__name__} in '{name}'; it must hold Prompt"
            )
    if not len(task.train):
        raise ConfigError(f"task.name: {_named(kind)} has nothing to train on: 'train' is empty")
    turns = getattr(task, "max_turns", None)
    if not isinstance(turns, int) or turns < 1:
        raise ConfigError(f"task.name: {_named(kind)} has max_turns {turns!r}; it must be a whole number from 1")


def _named(kind: type[Task]) -> str:
    return f"{kind.__name__} ({source_place(kind)})"
