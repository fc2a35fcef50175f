"""Starting and ending embedded servers as processes of this machine."""

import os
import sys
from pathlib import Path

from megatron_rl.engines.processes.server_process import Servers, environment_of_servers
from megatron_rl.server.quantized_linear import EngineQuantization

_PACKAGE_ROOT = Path(__file__).resolve().parents[3]


class EmbeddedServers(Servers):
    """Embedded servers.

    threads: torch threads of each server; 0: half of this process's cores, shared by the servers, for threads that
    outnumber the free cores make small models ten times slower.
    """

    noun = "embedded server"

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
        engine_quantization: EngineQuantization | None = None,
    ) -> None:
        super().__init__(log_dir, count, start_timeout_s)
        self._threads = threads or max(_cores() // (2 * count), 1)
        self._flags = ["--model", str(Path(model_dir).absolute()), "--dtype", dtype, "--weight-version", weight_version]
        self._flags += ["--threads", str(self._threads)]
        self._flags += ["--deterministic"] if deterministic else []
        self._flags += engine_quantization.flags if engine_quantization else []

    def command(self, index: int, port: int) -> list[str]:
        command = [sys.executable, "-m", "megatron_rl.server.app", *self._flags]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        return command + (["--parent-pid", str(os.getpid())] if sys.platform.startswith("linux") else [])

    def environment(self) -> dict[str, str]:
        env = environment_of_servers()
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), env.get("PYTHONPATH")]))
        env["OMP_NUM_THREADS"] = str(self._threads)
        return env


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
