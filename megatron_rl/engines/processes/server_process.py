"""Servers as processes of this machine. Every kind of server is started, waited for and stopped in the same way."""

import os
import re
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import psutil

from megatron_rl.engines.processes.fork_server import VARIABLE, ForkedServer, fork_command
from megatron_rl.errors import EngineError, ExitCode
from megatron_rl.ports import free_port
from megatron_rl.protocol.api_key import new_key, write_private
from megatron_rl.supervise import end_sessions, kill_session, stops_blocked

_TAIL_BYTES = 4000
_STARTS = 3  # another process may take a free port before the server binds it
_PORT_TAKEN = re.compile(
    r"address already in use|port \d+ is (?:already in use|unavailable|not available)", re.IGNORECASE
)
# A server must not inherit the trainer's place in its process group.
_OF_THE_TRAINER = {VARIABLE, "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


class ServerProcess:
    """A process that listens on a port of loopback and responds to /health."""

    def __init__(
        self,
        name: str,
        command: Callable[[int], list[str]],
        log: Path,
        env: dict[str, str],
        *,
        forks: bool = False,
        sees_stops: bool = True,
    ) -> None:
        """Start the process.

        Args:
            name: name in error messages.
            command: returns the command that starts it on a given port.
            log: file to which its output is appended.
            env: its environment.
            forks: the command is `python -m megatron_rl ...`, and the run's fork server starts it.
            sees_stops: SIGTERM and the other signals that ask for a stop reach it.
        """
        self.name, self.log, self._forks, self._sees_stops = name, log, forks, sees_stops
        self._command, self._env, self._starts = command, env, 0
        self._spawn()

    def _spawn(self) -> None:
        self._starts += 1
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | ForkedServer
        command = self._command(self.port)
        with self.log.open("ab") as out:
            self._log_start = out.tell()  # the log may hold a previous run
            if self._forks:
                self.process = fork_command(command[3:], self.port, self._env, self.log)
                return
            with nullcontext() if self._sees_stops else stops_blocked():
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    env=self._env,
                    start_new_session=True,
                )

    @property
    def url(self) -> str:
        """Base URL of the server."""
        return f"http://127.0.0.1:{self.port}"

    def await_health(self, timeout_s: float, deadline: float) -> None:
        """Wait until the server responds to /health. Start it again on another port if its port is taken.

        Args:
            timeout_s: the time limit in seconds, for the error message.
            deadline: end of the wait, in the time of `time.monotonic`.

        Raises:
            EngineError: with the end of the log, if the process ends or the deadline passes.
        """
        while not self.is_healthy():
            code = self.process.poll()
            tail = self._tail()
            if code is not None and _PORT_TAKEN.search(tail) and self._starts < _STARTS:
                self._spawn()
            elif code is not None:
                error = EngineError(f"{self.name} ended with code {code} at its start; {self.log} ends:\n{tail}")
                if code == ExitCode.USER:  # an embedded server that says so ends the same way each time
                    error.exit_code = ExitCode.USER
                raise error
            elif time.monotonic() > deadline:
                raise EngineError(
                    f"{self.name} was not healthy within {timeout_s:g} s (rollout.start_timeout_s); {self.log} ends:\n"
                    f"{tail}"
                )
            else:
                time.sleep(0.1)

    def restart(self) -> None:
        """Start the process once more, on another port. Kill it if it still runs. Return without waiting for it."""
        if self.process.poll() is None:
            kill_session(self.process.pid)
            self.process.wait()
        self._spawn()

    def is_healthy(self) -> bool:
        """Return whether this process listens on its port and responds to /health."""
        if not self._listens():
            return False
        try:
            return httpx.get(f"{self.url}/health", timeout=5.0, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def _listens(self) -> bool:
        """Return whether this server listens on the port. Another process may have taken the port meanwhile."""
        with suppress(psutil.Error):
            leader = psutil.Process(self.process.pid)
            for process in (leader, *leader.children(recursive=True)):
                for connection in process.net_connections("tcp"):
                    if connection.status == psutil.CONN_LISTEN and connection.laddr.port == self.port:
                        return True
        return False

    def _tail(self) -> str:
        written = self.log.read_bytes()[self._log_start :]
        return written[-_TAIL_BYTES:].decode(errors="replace").strip() or "(empty)"


class Servers(ABC):
    """Servers on loopback, one process and one log file (`server-<i>.log`) each.

    Each server has its own session, so that Ctrl-C in a terminal reaches only the trainer. The servers end with this
    process. Enter the context (or call `start`) on the main thread: for Linux, the end of the thread that started a
    child is the end of its parent. `stop` ends only what `start` started.
    """

    noun = "server"
    forks = False  # whether the run's fork server starts them
    stop_signal = signal.SIGTERM  # ends a server; SIGKILL if the signals that ask for a stop are kept from it

    def __init__(self, log_dir: Path | str, count: int, start_timeout_s: float, *, keyed: bool = False) -> None:
        self.log_dir, self.count, self.start_timeout_s = Path(log_dir), count, start_timeout_s
        self.keyed = keyed  # the servers want a random key
        self.api_key: str | None = None
        self._servers: list[ServerProcess] = []

    def prepare(self) -> None:
        """Write what the servers read at their start."""
        return

    def check(self) -> None:
        """Raise EngineError for an error that can be found before a server is started."""
        return

    @abstractmethod
    def command(self, index: int, port: int) -> list[str]:
        """Return the command that starts server `index` on `port`."""

    @abstractmethod
    def environment(self) -> dict[str, str]:
        """Return the environment of the servers."""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def urls(self) -> tuple[str, ...]:
        """Base URLs of the started servers."""
        return tuple(server.url for server in self._servers)

    @property
    def key_file(self) -> Path:
        """File of the key that the servers want, if they want one."""
        return self.log_dir.absolute() / "api-key"

    @property
    def router_url(self) -> str | None:
        """URL of the router through which generation goes instead of to `urls`; None without a router."""
        return None

    def process(self, index: int) -> ServerProcess:
        """Return the process of a server that was started."""
        return self._servers[index]

    @property
    def pids(self) -> tuple[int, ...]:
        """Process id of each server's first process. Other processes of a server end with it."""
        return tuple(server.process.pid for server in self._servers)

    def start(self) -> Self:
        """Start all servers and wait until they are healthy. Raises EngineError with the log of a server that ends."""
        return self.launch().wait_healthy()

    def launch(self) -> Self:
        """Start the processes without waiting for them."""
        if self._servers:
            raise EngineError(f"the {self.noun}s were started already")
        self.check()
        self.log_dir.mkdir(parents=True, exist_ok=True)
        if self.keyed:
            self.api_key = new_key()
            write_private(self.key_file, self.api_key)
        self.prepare()
        for index in range(self.count):
            log = self.log_dir / f"server-{index}.log"
            command = partial(self.command, index)
            name, env = f"{self.noun} {index}", self.environment()
            sees_stops = self.stop_signal != signal.SIGKILL
            self._servers.append(ServerProcess(name, command, log, env, forks=self.forks, sees_stops=sees_stops))
        return self

    def wait_healthy(self) -> Self:
        """Wait until the servers that `launch` started are healthy.

        Raises EngineError with the log of a server that ends. All servers are then stopped.
        """
        try:
            deadline = time.monotonic() + self.start_timeout_s
            for server in self._servers:
                server.await_health(self.start_timeout_s, deadline)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop all servers with `stop_signal`, then SIGKILL after a grace time. Return when all have ended.

        Idempotent.
        """
        servers, self._servers = self._servers, []
        end_sessions([server.process for server in servers], number=self.stop_signal)


def environment_of_servers() -> dict[str, str]:
    """Return this process's environment without the variables that make it a rank of a trainer, and with HF offline."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC_")}
    return {key: value for key, value in own.items() if key not in _OF_THE_TRAINER} | {"HF_HUB_OFFLINE": "1"}
