"""Choice of the jail for this machine. Code that tries to break out tests each kind of jail before it is used."""

import functools
import logging
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_rl.errors import ConfigError
from megatron_rl.sandbox.runner import Way, run_block
from megatron_rl.sandbox.seccomp import filter_program

_log = logging.getLogger(__name__)

_MEND = (
    "install bubblewrap (`bwrap`), or allow user namespaces (sysctl user.max_user_namespaces > 0, "
    "kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; "
    "in a container, a seccomp profile that permits unshare and mount), "
    "or accept that code of the model can read and delete your files: task.sandbox=unsafe"
)


@functools.cache
def find_jail() -> Way:
    """Return the first way to make a jail that works and isolates code on this machine, tested once per process.

    Raises ConfigError if none does.
    """
    # For root, bubblewrap is last: it cannot run the code as another user, and a limit on processes does not bind root.
    ways: list[Way] = ["namespaces", "bwrap"] if os.geteuid() == 0 else ["bwrap", "namespaces"]
    faults = []
    for way in ways:
        fault = probe(way)
        if not fault:
            return way
        faults.append(f"{way}: {fault}")
    raise ConfigError(f"no jail for task.name: tool holds on this machine ({'; '.join(faults)}): {_MEND}")


@functools.cache
def allow_unsafe() -> Way:
    """Return the way without a jail, which has only the limits. Write a warning once per process."""
    _log.warning("task.sandbox: unsafe: code of the model runs with your rights, without a jail around your files")
    return "unsafe"


def probe(way: Way) -> str:
    """Return why this way does not isolate code here, "" if it does. Code in it tries to access what is forbidden."""
    if filter_program() is None:
        return f"no filter of system calls for {os.uname().machine}"
    if way == "bwrap" and shutil.which("bwrap") is None:
        return "not installed"
    with _bait() as bait:
        try:
            result = run_block(way, f"BAIT = {bait!r}\n{_PROBE}", seconds=10.0, memory_mb=64, output_bytes=1 << 16)
        except ConfigError as error:
            return str(error)
    if not result.ok or not result.output.endswith("\n"):
        return f"the probe failed: {result.output[-300:].strip()}"
    reached = result.output.splitlines()
    return "" if reached == ["done"] else f"code in it reaches {', '.join(reached[:-1])}"


@contextmanager
def _bait() -> Iterator[dict[str, Any]]:
    """Yield the targets of the probe: a listening socket, an abstract socket and a file that every user may use."""
    name = f"megatron-rl-{uuid.uuid4().hex}"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as abstract,
        tempfile.TemporaryDirectory(prefix="megatron-rl-") as folder,
    ):
        abstract.bind(f"\0{name}")
        abstract.listen()
        os.chmod(folder, 0o755)
        file = Path(folder, "canary")
        file.write_text("canary", encoding="utf-8")
        yield {
            "port": tcp.getsockname()[1],
            "name": name,
            "file": str(file),
            "pid": os.getpid(),
            "home": str(Path.home()),
        }


_PROBE = """
import ctypes, os, socket

def attempt(what, work):
    try:
        done = work()
    except OSError:
        return
    if done is not False:
        print(what)

def fork():
    if os.fork() == 0:
        os._exit(0)

attempt("the network", lambda: socket.create_connection(("127.0.0.1", BAIT["port"]), 2))
attempt("sockets of this machine", lambda: socket.socket(socket.AF_UNIX).connect("\\0" + BAIT["name"]))
attempt("files of this machine", lambda: open(BAIT["file"]))
attempt("the trainer", lambda: os.kill(BAIT["pid"], 0))
attempt("the process list", lambda: os.listdir("/proc"))
attempt("a new process", fork)
attempt("the root folder", lambda: open("/canary", "w"))
attempt("the interpreter's files", lambda: open(os.__file__, "a"))
attempt("mount", lambda: ctypes.CDLL(None).mount(b"x", b"/work", b"tmpfs", 0, None) == 0)
attempt("the environment", lambda: bool(os.environ))
with open("own", "w") as own:
    own.write("own")
print("done")
"""
