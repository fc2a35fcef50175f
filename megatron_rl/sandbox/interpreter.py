"""The Python interpreter that runs code in a jail: the base interpreter of this one and the folders it needs."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.errors import ConfigError

# The path has no script folder, user site or site-packages, and text is UTF-8.
FLAGS = ("-P", "-s", "-S", "-X", "utf8")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_SLACK_BYTES = 4 << 20

# The program loads every extension module of the standard library. It prints its address space in bytes before that,
# the folders of the standard library, and the paths of all shared libraries in use.
_LOOK = """
import ctypes, json, os, resource, select, signal, sys, time
pages = int(open("/proc/self/statm").read().split()[0])
import importlib, sysconfig
for folder in sys.path:
    for name in sorted(os.listdir(folder)) if folder.endswith("lib-dynload") else ():
        try:
            importlib.import_module(name.partition(".")[0])
        except ImportError:
            pass
maps = [line.split(None, 5)[5].strip() for line in open("/proc/self/maps") if ".so" in line]
folders = [path for path in (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), *sys.path) \
if os.path.isdir(path)]
json.dump({"bytes": pages * resource.getpagesize(), "folders": folders, "libraries": maps}, sys.stdout)
"""


@dataclass(frozen=True)
class Interpreter:
    """The interpreter and what a jail must contain for it.

    Attributes:
        path: the executable.
        environment: the environment variables that it is started with.
        binds: pairs of a file or folder on this machine and its name in the jail.
        links: pairs of a name in the jail and the text of the symbolic link there.
        hidden: folders below those of `binds` that are empty in the jail.
        own_bytes: address space that the interpreter takes without any code, in bytes.
    """

    path: str
    environment: dict[str, str]
    binds: tuple[tuple[str, str], ...]
    links: tuple[tuple[str, str], ...]
    hidden: tuple[str, ...]
    own_bytes: int


@functools.cache
def interpreter() -> Interpreter:
    """Return the interpreter, examined once per process. Raises ConfigError if it does not start by itself."""
    path = os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)
    # Hash order is the same in every process, so that the same code gives the same output.
    environment = {"PYTHONHASHSEED": "0"}
    # Interpreters of environment modules need this variable to find their library.
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    command = [path, *FLAGS, "-c", _LOOK]
    try:
        answer = subprocess.run(
            command, env=environment, cwd="/", capture_output=True, text=True, timeout=120, check=True
        )
        seen = json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        told = (getattr(error, "stderr", "") or str(error)).strip()[-300:]
        raise ConfigError(
            f"{path} does not start without an environment, as the sandbox needs it to: {told}"
        ) from error
    libraries = [os.path.dirname(library) for library in seen["libraries"] if os.path.isfile(library)]
    links = tuple((name, os.readlink(name)) for name in ("/lib", "/lib32", "/lib64") if os.path.islink(name))
    folders = {_through(links, os.path.normpath(folder)) for folder in seen["folders"]} | set(
        map(os.path.realpath, libraries)
    )
    outer = sorted(folder for folder in folders if not any(_inside(folder, other) for other in folders))
    binds = [(os.path.realpath(folder), folder) for folder in outer]
    loaders = [str(loader) for folder in ("/lib", "/lib64") for loader in Path(folder).glob("ld-*.so*")]
    binds += [(os.path.realpath(loader), _through(links, loader)) for loader in loaders]
    binds += [(name, name) for name in ("/etc/ld.so.cache", *_DEVICES) if os.path.exists(name)]
    hidden = sorted(
        str(found)
        for folder in outer
        for pattern in ("*-packages", "python*/*-packages")
        for found in Path(folder).glob(pattern)
        if found.is_dir() and not found.is_symlink()
    )
    return Interpreter(path, environment, tuple(binds), links, tuple(hidden), seen["bytes"] + _SLACK_BYTES)


def _through(links: tuple[tuple[str, str], ...], path: str) -> str:
    """Return the path with those links resolved. All of the links are in the root folder."""
    for name, text in links:
        if path == name or path.startswith(f"{name}/"):
            return os.path.normpath(os.path.join("/", text) + path[len(name) :])
    return path


def _inside(path: str, folder: str) -> bool:
    return path != folder and path.startswith(f"{folder.rstrip('/')}/")
