"""The fork server of a run: it imports the embedded engine while the trainer is imported, and forks servers from it.

The launcher starts it before it imports the training stack. Rank 0 inherits its socket, and starts servers by a
message in place of a new process that imports for seconds. One JSON line is a request, one line its response. The fork
server ends when launcher and rank 0 have ended, and its servers end with it.
"""

import ctypes
import importlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_rl.forking import (
    flush_output,
    has_one_thread,
    like_new,
    name_process,
    report_error,
    run_as_command,
)
from megatron_rl.supervise import block_stops, kill_session

# In the environment of ranks: file descriptor of the socket, and pid of the fork server.
VARIABLE = "MEGATRON_RL_FORK_SERVER"
_MODULES = ("megatron_rl.server.app", "transformers.models.auto.modeling_auto")
_POLL_S = 0.05
_CLIENT_S = 0.5  # between checks that the process that asked for a server still lives
_END_S = 5.0
_PR_SET_PDEATHSIG = 1
_asking = threading.Lock()  # one request at a time
_numbers = itertools.count()


class ForkServer:
    """The fork server, for the launcher. The calling process must have one thread."""

    def __init__(self, modules: Sequence[str] = _MODULES) -> None:
        ours, theirs = socket.socketpair()
        flush_output()
        launcher = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            _become_server(theirs, ours, launcher, modules)
        theirs.close()
        self._socket = ours
        self.environment = {VARIABLE: f"{ours.fileno()} {self._pid}"}

    def close(self) -> None:
        """End the fork server and the servers that it still has."""
        self._socket.close()
        deadline = time.monotonic() + _END_S
        while os.waitpid(self._pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(self._pid, signal.SIGKILL)
            time.sleep(_POLL_S)


class ForkedServer:
    """A forked server, with those methods of `subprocess.Popen` that `ServerProcess` and `end_sessions` use."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self._connection, self.pid = connection, pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while the server runs."""
        if self._code is None:
            self._code = _ask(self._connection, {"poll": self.pid})
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code. Raise subprocess.TimeoutExpired after `timeout` seconds."""
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"server with pid {self.pid}", timeout or 0.0)
            time.sleep(_POLL_S)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def fork_server_pid() -> int | None:
    """Return the pid of this run's fork server, which is the parent of its servers; None if none can fork.

    Waits until the fork server has imported its modules.
    """
    if VARIABLE not in os.environ:
        return None
    with _connect() as connection:
        forks = _ask(connection, {"forks": True})
    return int(os.environ[VARIABLE].split()[1]) if forks is True else None


def fork_command(arguments: list[str], port: int, environment: dict[str, str], log: Path) -> ForkedServer:
    """Fork `python -m megatron_rl ARGUMENTS` in a session of its own. `fork_server_pid` is not None.

    In `ps` and `top` the server is called `mrl-serve-<port>`.

    Args:
        arguments: arguments of the command line.
        port: the port on which it listens, for its name.
        environment: the whole environment of the command.
        log: file to which its output is appended.
    """
    connection = _connect()
    request = {"arguments": arguments, "port": port, "environment": environment, "log": str(log)}
    request["client"] = os.getpid()
    return ForkedServer(connection, _ask(connection, request))


def _connect() -> socket.socket:
    return socket.socket(fileno=os.dup(int(os.environ[VARIABLE].split()[0])))


def _ask(connection: socket.socket, request: dict[str, Any]) -> Any:
    """Send a request and return the response. A fork server that has ended has ended its servers: code -SIGKILL.

    Responses carry the number of their request. An interrupted call leaves a response behind, which the next one skips.
    """
    with _asking:
        number = next(_numbers)
        try:
            connection.sendall(json.dumps({**request, "number": number}).encode() + b"\n")
            held = b""
            while True:
                line, ended, held = held.partition(b"\n")
                if ended:
                    response = json.loads(line)
                    if response["number"] == number:
                        return response["value"]
                    continue
                part = connection.recv(1 << 16)
                if not part:
                    return -signal.SIGKILL
                held = line + part
        except OSError:
            return -signal.SIGKILL


def _become_server(connection: socket.socket, others: socket.socket, launcher: int, modules: Sequence[str]) -> NoReturn:
    """Run the fork server and end this process. Never return: the launcher's frames must not continue here."""
    code = 1
    try:
        others.close()
        os.setsid()  # Ctrl-C reaches the launcher only
        block_stops()
        _die_with_parent()
        name_process("mrl-fork-server")
        if os.getppid() == launcher:
            _Loop(connection, modules).run()
        code = 0
    except BaseException as error:  # noqa: BLE001  nothing above handles it
        code = report_error(error)
    finally:
        flush_output()
        os._exit(code)


class _Loop:
    """The fork server's own side."""

    def __init__(self, connection: socket.socket, modules: Sequence[str]) -> None:
        self.connection = connection
        for name in modules:
            importlib.import_module(name)
        self.forks = has_one_thread()
        self.running: dict[int, int] = {}  # server -> the process that asked for it
        self.ended: dict[int, int] = {}

    def run(self) -> None:
        """Respond to requests until the other end of the socket is closed everywhere."""
        pending = b""
        while True:
            if select.select([self.connection], [], [], _CLIENT_S)[0]:
                part = self.connection.recv(1 << 16)
                if not part:
                    break
                *lines, pending = (pending + part).split(b"\n")
                for line in lines:
                    request = json.loads(line)
                    response = {"number": request["number"], "value": self._respond(request)}
                    self.connection.sendall(json.dumps(response).encode() + b"\n")
            self._reap()
            for server, client in list(self.running.items()):
                if not _lives(client):
                    kill_session(server)
        for server in self.running:
            kill_session(server)

    def _respond(self, request: dict[str, Any]) -> int | bool | None:
        if "forks" in request:
            return self.forks
        if "poll" in request:
            self._reap()
            return self.ended.get(request["poll"])
        pid = os.fork()
        if pid == 0:
            self._become_command(request)
        self.running[pid] = request["client"]
        return pid

    def _become_command(self, request: dict[str, Any]) -> NoReturn:
        code = 1
        try:
            self.connection.close()
            os.setsid()
            _die_with_parent()
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.clear()
            os.environ.update(request["environment"])
            name_process(f"mrl-serve-{request['port']}")  # its command line is the launcher's
            like_new()
            code = run_as_command(request["arguments"])
        except BaseException as error:  # noqa: BLE001  nothing above handles it
            code = report_error(error)
        finally:
            flush_output()
            os._exit(code)

    def _reap(self) -> None:
        for server in list(self.running):
            pid, status = os.waitpid(server, os.WNOHANG)
            if pid:
                del self.running[server]
                self.ended[server] = os.waitstatus_to_exitcode(status)


def _die_with_parent() -> None:
    """Make the kernel kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _lives(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] not in ("Z", "X")


def may_fork_servers() -> bool:
    """Return whether this process may start a fork server."""
    return sys.platform.startswith("linux") and has_one_thread()
