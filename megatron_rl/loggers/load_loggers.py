"""The loggers of a run: found by name or import path, checked before the run starts, then started."""

import inspect
from collections.abc import Sequence
from typing import Any, cast

from megatron_rl.config import Config
from megatron_rl.diagnostics import RunLog
from megatron_rl.diagnostics.logger import Logger
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.loggers.tensorboard_logger import TensorBoardLogger
from megatron_rl.loggers.wandb_logger import WandbLogger
from megatron_rl.plugins import is_import_path, load_plugin

_KEY = "run.loggers"
_BUILT_IN: dict[str, type[Logger]] = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger}
# Method -> names of the arguments it is called with.
_METHODS = {"start": ("config", "folder", "resume_from"), "log": ("record",), "close": ()}


def check_loggers(names: Sequence[str]) -> None:
    """Check that every logger can be constructed and has the methods of `Logger`. Constructs none.

    Raises:
        ConfigError: a logger does not exist or has other methods, and the message has its file:line; or its package is
            not installed.
    """
    for name in names:
        if _logger_class(name) is WandbLogger:
            WandbLogger.check()


def start_loggers(config: Config, resume_from: int | None, log: RunLog) -> None:
    """Construct and start the loggers of a run, and add them to its log. For rank 0.

    Args:
        config: the resolved configuration.
        resume_from: see `Logger.start`.
        log: the run log, which closes them.

    Raises:
        UserError: a logger raised; the message names it.
    """
    for name in config.run.loggers:
        kind = _logger_class(name)
        try:
            logger = kind()
            logger.start(config.model_dump(mode="json"), config.run.folder, resume_from)
        except Exception as error:  # the user's code may raise anything
            raise UserError(f"logger {name} failed to start ({type(error).__name__}: {error})") from error
        log.add_logger(name, logger)


def _logger_class(name: str) -> type[Logger]:
    if not is_import_path(name):
        return _BUILT_IN[name]  # config/schema.py knows the names
    kind = load_plugin(name, _KEY)
    if not inspect.isclass(kind):
        raise ConfigError(f"{_KEY}: {name} is a {type(kind).__name__}, not a class")
    _check_call(kind, "__init__", ())
    for method, arguments in _METHODS.items():
        if not callable(getattr(kind, method, None)):
            raise ConfigError(f"{_KEY}: {_place(kind)}: class {kind.__name__} has no method {_call(method, arguments)}")
        _check_call(kind, method, arguments)
    return cast(type[Logger], kind)


def _check_call(kind: type, method: str, arguments: tuple[str, ...]) -> None:
    """Raise ConfigError unless the method can be called with these positional arguments."""
    found = kind if method == "__init__" else getattr(kind, method)
    try:
        signature = inspect.signature(found)
    except ValueError:  # a method written in C has none
        return
    own = method != "__init__" and inspect.isfunction(inspect.getattr_static(kind, method))
    try:
        signature.bind(*(("self",) if own else ()), *arguments)
    except TypeError as error:
        raise ConfigError(
            f"{_KEY}: {_place(found)}: {kind.__name__}.{method} is called as "
            f"{_call(method, arguments)}, but it has the arguments {signature} ({error})"
        ) from None


def _call(method: str, arguments: tuple[str, ...]) -> str:
    return f"{method}({', '.join(arguments)})"


def _place(found: Any) -> str:
    """Return file:line of a class or function, or its name if it has no source."""
    try:
        return f"{inspect.getsourcefile(found)}:{inspect.getsourcelines(found)[1]}"
    except (TypeError, OSError):
        return str(getattr(found, "__qualname__", found))
