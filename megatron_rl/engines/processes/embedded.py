"""Embedded servers as processes of this machine."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from megatron_rl.engines.processes.fork_server import fork_server_pid
from megatron_rl.engines.processes.server_process import Servers, environment_of_servers
from megatron_rl.protocol.server_options import EngineQuantization, ServerOptions

_PACKAGE_ROOT = Path(__file__).resolve().parents[3]


class EmbeddedServers(Servers):
    """Embedded servers, one process each."""

    noun = "embedded server"
    stop_signal = signal.SIGKILL

    @property
    def forks(self) -> bool:  # type: ignore[override]
        """Whether the run's fork server starts them."""
        return fork_server_pid() is not None

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
        *,
        keyed: bool = False,
        save_dirs: tuple[Path, ...] = (),
    ) -> None:
        """Set the options of the servers; `start` starts them.

        Args:
            model_dir: the Hugging Face folder to serve.
            log_dir: folder for the log files.
            count: number of servers.
            dtype: dtype of unquantized weights and of activations: fp32, bf16 or fp16.
            threads: torch threads of each server. 0 shares half of this process's cores among the servers: with more
                threads than free cores, small models are ten times slower.
            deterministic: every request is its own batch.
            weight_version: version of the weights as loaded.
            start_timeout_s: seconds until a server must be healthy.
            engine_quantization: quantization of weights and inputs; None: none.
            keyed: the servers want a random key.
            save_dirs: folders below which the servers may write their weights.
        """
        super().__init__(log_dir, count, start_timeout_s, keyed=keyed)
        self._options = ServerOptions(
            Path(model_dir).absolute(),
            dtype=dtype,
            threads=threads or max(_cores() // (2 * count), 1),
            deterministic=deterministic,
            weight_version=weight_version,
            quantization=engine_quantization,
            api_key_file=self.key_file if keyed else None,
            save_dirs=tuple(folder.absolute() for folder in save_dirs),
        )

    def command(self, index: int, port: int) -> list[str]:
        """Return the command line of server `index` on `port`."""
        parent = (fork_server_pid() or os.getpid()) if sys.platform.startswith("linux") else 0
        options = replace(self._options, port=port, parent_pid=parent)
        return [sys.executable, "-m", "megatron_rl", *options.arguments]

    def environment(self) -> dict[str, str]:
        """Return the servers' environment: the package is importable, and OpenMP uses the server's threads."""
        env = environment_of_servers()
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), env.get("PYTHONPATH")]))
        env["OMP_NUM_THREADS"] = str(self._options.threads)
        return env


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
