"""A user's own code, named in the configuration by an import path: `file.py:Name` or `package.module:Name`.

A file is imported once per process. Its folder is appended to `sys.path`, so that it can import files beside it.
"""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_rl.errors import ConfigError, did_you_mean

_STDLIB = sysconfig.get_path("stdlib")


def is_import_path(name: str) -> bool:
    """Return whether a value of the configuration names the user's own code, not something of this package."""
    return ":" in name and "://" not in name


def absolute_import_path(path: str, folder: Path) -> str:
    """Return the import path with an absolute file name. A relative one is relative to `folder`."""
    place, _, name = path.rpartition(":")
    return f"{(folder / place).resolve()}:{name}" if place.endswith(".py") else path


def load_plugin(path: str, key: str) -> Any:
    """Import what an import path names.

    Args:
        path: `file.py:Name` or `package.module:Name`.
        key: the key of the configuration that gives the path, for errors.

    Returns:
        The class or function `Name`.

    Raises:
        ConfigError: the file, module or name does not exist, or the import raised. The message has file:line.
    """
    place, _, name = path.rpartition(":")
    if not place or not name.isidentifier():
        raise ConfigError(f"{key} is '{path}'; give file.py:Name or package.module:Name")
    module = _import_file(Path(place), key) if place.endswith(".py") else _import_module(place, key)
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, [n for n in vars(module) if not n.startswith("_")], n=1, cutoff=0.0)
        raise ConfigError(f"{key}: {place} has no '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""))
    return getattr(module, name)


def source_digest(path: str, key: str) -> str:
    """Return the SHA-256 of the source file that an import path names; the arguments are those of `load_plugin`."""
    place = path.rpartition(":")[0]
    if place.endswith(".py"):
        source = Path(place)
    else:
        load_plugin(path, key)
        origin = getattr(sys.modules[place], "__file__", None)
        if origin is None:
            raise ConfigError(f"{key}: {place} has no source file, so that a change of it would not be noticed")
        source = Path(origin)
    if not source.is_file():
        raise ConfigError(f"{key}: there is no file {source}")
    return hashlib.sha256(source.read_bytes()).hexdigest()


def source_place(thing: Any) -> str:
    """Return file:line where a class or function is defined, for messages. Its name if it has no source file."""
    thing = inspect.unwrap(thing)
    try:
        return f"{inspect.getsourcefile(thing)}:{inspect.getsourcelines(thing)[1]}"
    except (OSError, TypeError):
        return str(getattr(thing, "__qualname__", thing))


def raised_place(error: BaseException) -> str:
    """Return file:line of the code that raised, for messages: the user's line, not that of a library it called."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith(_STDLIB)] or frames
    return f"{own[-1].filename}:{own[-1].lineno}" if own else "unknown place"


def accepted_names(call: Callable[..., Any], offered: Collection[str], key: str) -> tuple[str, ...]:
    """Return which keyword arguments a class or function takes, in the order of `offered`.

    Args:
        call: the class or function.
        offered: names of the keyword arguments that it may take.
        key: the key of the configuration that names it, for errors.

    Raises:
        ConfigError: it requires another argument. The message has file:line.
    """
    names: set[str] = set()
    for parameter in inspect.signature(call).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            names.update(offered)
        elif parameter.kind is not inspect.Parameter.POSITIONAL_ONLY and parameter.name in offered:
            names.add(parameter.name)
        elif parameter.default is parameter.empty and parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            raise ConfigError(
                f"{key}: {call.__name__} ({source_place(call)}) requires the argument '{parameter.name}', which it is "
                f"not given by name; {did_you_mean(parameter.name, offered)}"
            )
    return tuple(name for name in offered if name in names)


def _import_file(file: Path, key: str) -> ModuleType:
    file = file.resolve()
    if not file.is_file():
        raise ConfigError(f"{key}: there is no file {file}")
    # The name is a function of the path, so that every process pickles the classes of the file under the same name.
    name = f"megatron_rl_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # the name ends with .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    try:
        spec.loader.exec_module(module)
    # The user's code may raise anything, and a half-imported module must not stay.
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception):
            raise ConfigError(f"{key}: importing {_place(error, file)} raised {_text(error)}") from error
        raise
    return module


def _import_module(name: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{key}: there is no module '{error.name}'; install it, or give a file, {name}.py:Name"
        ) from error
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(f"{key}: importing {_place(error, name)} raised {_text(error)}") from error


def _place(error: Exception, imported: Path | str) -> str:
    """Return file:line of the user's code that raised, or `imported` if it has no line."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    own = [f for f in frames if f.filename == str(imported)] or frames[1:]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else str(imported)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"
