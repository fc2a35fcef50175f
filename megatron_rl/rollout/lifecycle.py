"""Starting and ending embedded servers as processes of this machine."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from megatron_rl.errors import EngineError
from megatron_rl.rollout.quantised import Quantisation

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
_GRACE_S = 5.0
_TAIL_BYTES = 4000
_PORT_TAKEN = re.compile(r"address already in use", re.IGNORECASE)


@dataclass(eq=False)
class _Server:
    port: int
    log: Path
    log_start: int  # the log may hold an earlier run
    process: subprocess.Popen[bytes]

    def tail(self) -> str:
        written = self.log.read_bytes()[self.log_start :]
        return written[-_TAIL_BYTES:].decode(errors="replace").strip() or "(empty)"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class EmbeddedServers:
    """Embedded servers on loopback, one process and one log file (`server-<i>.log`) each.

    They live in sessions of their own, so that Ctrl-C in a terminal reaches the trainer alone, and die with
    this process. Enter it (or call `start`) on the main thread: Linux takes the end of the thread that started
    a child for the end of its parent. `stop` ends only what `start` started.
    threads: torch threads of each server; 0: half of this process's cores, shared by the servers, for threads that
    outnumber the free cores make small models ten times slower.
    """

    def __init__(
        self,
        model_dir: Path | str,
        log_dir: Path | str,
        count: int = 1,
        dtype: str = "fp32",
        threads: int = 0,
        deterministic: bool = False,
        weight_version: str = "0",
        start_timeout_s: float = 300.0,
        quantisation: Quantisation | None = None,
    ) -> None:
        self._log_dir, self._count = Path(log_dir), count
        self._threads = threads or max(_cores() // (2 * count), 1)
        self._flags = ["--model", str(Path(model_dir).absolute()), "--dtype", dtype, "--weight-version", weight_version]
        self._flags += ["--threads", str(self._threads)]
        self._flags += ["--deterministic"] if deterministic else []
        self._flags += quantisation.flags if quantisation else []
        self._start_timeout_s = start_timeout_s
        self._servers: list[_Server] = []

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(server.url for server in self._servers)

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(server.process.pid for server in self._servers)

    def start(self) -> Self:
        """Start all servers and wait until they are healthy; EngineError quotes the log of one that dies."""
        return self.launch().wait_healthy()

    def launch(self) -> Self:
        """Start the processes without waiting for them."""
        if self._servers:
            raise EngineError("the embedded servers were started already")
        self._log_dir.mkdir(parents=True, exist_ok=True)
        for index in range(self._count):
            self._servers.append(self._spawn(index))
        return self

    def wait_healthy(self) -> Self:
        """Wait for what `launch` started; EngineError quotes the log of a server that dies, and none is left running."""
        try:
            deadline = time.monotonic() + self._start_timeout_s
            for index in range(self._count):
                self._await_health(index, deadline)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """SIGTERM, and SIGKILL after a grace time; returns when all have ended. Idempotent."""
        servers, self._servers = self._servers, []
        for server in servers:
            _signal(server.process, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        for server in servers:
            with suppress(subprocess.TimeoutExpired):
                server.process.wait(max(deadline - time.monotonic(), 0.0))
            _signal(server.process, signal.SIGKILL)
            server.process.wait()

    def _spawn(self, index: int) -> _Server:
        port = _free_port()
        command = [sys.executable, "-m", "megatron_rl.rollout.server", *self._flags]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        command += ["--parent-pid", str(os.getpid())] if sys.platform.startswith("linux") else []
        log = self._log_dir / f"server-{index}.log"
        with log.open("ab") as out:
            log_start = out.tell()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self._environment(), start_new_session=True
            )
        return _Server(port, log, log_start, process)

    def _environment(self) -> dict[str, str]:
        # The trainer's place in its process group is no business of a server.
        mine = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        env = {key: value for key, value in os.environ.items() if key not in mine and not key.startswith("TORCHELASTIC_")}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), env.get("PYTHONPATH")]))
        env["HF_HUB_OFFLINE"] = "1"
        env["OMP_NUM_THREADS"] = str(self._threads)
        return env

    def _await_health(self, index: int, deadline: float) -> None:
        attempts = 3
        while True:
            server = self._servers[index]
            code = server.process.poll()
            if code is not None:
                tail = server.tail()
                attempts -= 1
                if not (_PORT_TAKEN.search(tail) and attempts):
                    raise EngineError(
                        f"embedded server {index} ended with code {code} at its start; {server.log} ends:\n{tail}"
                    )
                server.log.unlink()
                self._servers[index] = self._spawn(index)
            elif _healthy(server.url):
                return
            elif time.monotonic() > deadline:
                raise EngineError(
                    f"embedded server {index} was not healthy within {self._start_timeout_s:g} s; "
                    f"{server.log}:\n{server.tail()}"
                )
            else:
                time.sleep(0.1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.poll() is None:
        process.send_signal(number)
