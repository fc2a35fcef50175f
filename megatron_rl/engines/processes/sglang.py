"""SGLang servers, and sglang-router in front of them, as processes of this machine.

They run in a separate environment, made by `make sglang`. On CPU they need a fixed set of flags and the replacement
modules of `sglang_cpu/`. No other process imports these modules.
"""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from safetensors import SafetensorError

from megatron_rl.config import SGLangConfig
from megatron_rl.engines.processes.engine_packages import check_gpu_packages, own_packages, read_packages
from megatron_rl.engines.processes.server_process import ServerProcess, Servers, environment_of_servers
from megatron_rl.errors import ConfigError, EngineError, StorageError
from megatron_rl.ports import free_port
from megatron_rl.precision.plan import DTYPES, PrecisionPlan
from megatron_rl.protocol.api_key import write_private
from megatron_rl.supervise import end_sessions
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.hf_model import check_folder
from megatron_rl.weights.quantized import WireTensors, export_dtypes, quantization_config
from megatron_rl.weights.write_folder import write_hf_folder

_CPU_SITE = Path(__file__).parent / "sglang_cpu"
_CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--disable-overlap-schedule", "--disable-cuda-graph", "--mem-fraction-static", "0.1"),
    *("--max-total-tokens", "16384", "--max-running-requests", "16", "--sleep-on-idle"),
)
# One thread: a tiny model is ten times slower with two.
_CPU_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "SGLANG_USE_CPU_ENGINE": "1"}
_OF_A_GPU_TRAINER = {
    *("OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING"),
    *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
}
# Flags that other keys decide. The same flag from a user would silently contradict the key.
_FROM_KEYS = {
    "--model-path": "model.path",
    "--model": "model.path",
    "--dtype": "precision.rollout",
    "--quantization": "precision.rollout",
    "--kv-cache-dtype": "precision.rollout",
    "--device": "run.device",
    "--tp": "rollout.sglang.tensor",
    "--tp-size": "rollout.sglang.tensor",
    "--tensor-parallel-size": "rollout.sglang.tensor",
    "--base-gpu-id": "rollout.sglang.first_gpu",
    "--mem-fraction-static": "rollout.sglang.mem_fraction",
    "--enable-memory-saver": "objective.name",
    "--enable-return-routed-experts": "rollout.routing_replay",
    "--api-key": "the run",
    "--host": "rollout.urls",
    "--port": "rollout.urls",
    "--weight-version": "the weight updates",
}

# Arguments with which a server has no key: SGLang reads one file of options, and its several tokenizers know no key.
_WITHOUT_KEY = ("--config", "--tokenizer-worker-num")


def server_flags(
    plan: PrecisionPlan,
    settings: SGLangConfig,
    *,
    device: str,
    routing: bool = False,
    keeps_cache: bool = False,
    offloads: bool = False,
) -> list[str]:
    """Return the arguments of sglang.launch_server that follow from the configuration.

    Args:
        plan: the resolved precision plan.
        settings: the section `rollout.sglang`.
        device: cpu or cuda.
        routing: the responses hold the experts chosen for every token.
        keeps_cache: weight updates keep the cache of running requests, so later prompts must not reuse it.
        offloads: the engine must be able to release its memory, which on a GPU needs a flag at the start.

    Raises:
        ConfigError: if another key decides an argument of `rollout.sglang.args`.
    """
    for argument in settings.args:
        key = _FROM_KEYS.get(argument.partition("=")[0])
        if key is not None:
            raise ConfigError(f"rollout.sglang.args holds {argument}, which {key} decides: remove it and set that key")
    flags = ["--dtype", str(DTYPES[plan.engine]).removeprefix("torch.")]
    if plan.rolls_out_low and not plan.dequantized:
        flags += ["--quantization", "fp8"]
    flags += ["--tp", str(settings.tensor)]
    on_gpu = ["--mem-fraction-static", str(settings.mem_fraction), "--kv-cache-dtype", "auto"]  # auto: the dtype above
    flags += _CPU_FLAGS if device == "cpu" else on_gpu
    flags += ["--enable-return-routed-experts"] if routing else []
    flags += ["--disable-radix-cache"] if keeps_cache else []
    flags += ["--enable-memory-saver"] if offloads and device != "cpu" else []
    return [*flags, *settings.args]


class SGLangServers(Servers):
    """`sglang.launch_server` processes. Each has a guard process that ends all processes of the server with it.

    With `settings.router`, an sglang-router process receives the generation requests (log: `router.log`).
    """

    noun = "SGLang server"

    def __init__(
        self,
        model_dir: Path | str,
        log_dir: Path | str,
        flags: list[str],
        settings: SGLangConfig = SGLangConfig(),  # noqa: B008  (frozen)
        count: int = 1,
        device: str = "cpu",
        weight_version: str = "0",
        start_timeout_s: float = 300.0,
        quantized: PrecisionPlan | None = None,
        *,
        keyed: bool = False,
        first_gpu: int = 0,
        broadcasts: bool = False,
    ) -> None:
        """Set the options of the servers; `start` starts them.

        Args:
            model_dir: the Hugging Face folder to serve.
            log_dir: folder for the log files.
            flags: from `server_flags`.
            settings: the section `rollout.sglang`.
            count: number of servers.
            device: cpu or cuda.
            weight_version: version of the weights as loaded.
            start_timeout_s: seconds until a server must be healthy.
            quantized: the precision plan, for engines with quantized weights. They start from a copy of the model
                (`start/` in the log folder, removed by `stop`) that holds the weights that the trainer would send:
                SGLang's own quantization at load has one scale per channel, not per block. None: they start from
                `model_dir`.
            keyed: the servers want a random key, unless a router or an argument of `settings` cannot have one.
            first_gpu: number of the first GPU of the first server.
            broadcasts: weights are broadcast to the servers.
        """
        given = {argument.partition("=")[0] for argument in settings.args}
        keyed = keyed and not settings.router and given.isdisjoint(_WITHOUT_KEY)
        super().__init__(log_dir, count, start_timeout_s, keyed=keyed)
        self._model, self._plan = Path(model_dir).absolute(), quantized
        self._copy = self.log_dir.absolute() / "start"
        self._key_options = self.log_dir.absolute() / "api-key.yaml"
        self._flags = [*flags, "--weight-version", weight_version]
        self._settings, self._device, self._first_gpu = settings, device, first_gpu
        self._broadcasts = broadcasts
        self._router: ServerProcess | None = None

    @property
    def router_url(self) -> str | None:
        """URL of the router; None without a router."""
        return None if self._router is None else self._router.url

    def command(self, index: int, port: int) -> list[str]:
        """Return the command line of server `index` on `port`. On GPUs, each server gets `tensor` GPUs, in order."""
        model = self._model if self._plan is None else self._copy
        flags = ["--model-path", str(model), *self._flags, "--host", "127.0.0.1", "--port", str(port)]
        flags += ["--config", str(self._key_options)] if self.keyed else []
        if self._device != "cpu":
            flags += ["--base-gpu-id", str(self._first_gpu + index * self._settings.tensor)]
        return _guarded(self._settings, "sglang.launch_server", flags)

    def environment(self) -> dict[str, str]:
        """Return the environment of the servers."""
        return inherited_environment(self._device) | server_environment(self._device)

    def check(self) -> None:
        """Raise EngineError if the interpreter of `rollout.sglang.python` does not exist or cannot serve on a GPU."""
        python = self._settings.python
        if not python.is_file():
            raise EngineError(
                f"rollout.sglang.python: no interpreter at {python.absolute()}: run `make sglang`, or name the "
                "interpreter of an environment that holds sglang"
            )
        if self._device != "cpu":
            check_gpu_packages(python, read_packages(python), own_packages(), broadcasts=self._broadcasts)

    def prepare(self) -> None:
        """Write the file with the key and, with quantized weights, the start folder."""
        if self.keyed:  # every user of the machine can read a command line
            write_private(self._key_options, f'api-key: "{self.api_key}"')
        if self._plan is not None:
            write_as_sent(self._model, self._plan, self._copy)

    def wait_healthy(self) -> Self:
        """Wait until the servers are healthy, then start the router and wait for it. On an error, all are stopped."""
        super().wait_healthy()
        if self._settings.router:
            self._router = start_router(self.urls, self.log_dir / "router.log", self._settings, self._device)
            try:
                self._router.await_health(self.start_timeout_s, time.monotonic() + self.start_timeout_s)
            except BaseException:
                self.stop()
                raise
        return self

    def stop(self) -> None:
        """Stop the router and the servers, and remove the start folder. Idempotent."""
        router, self._router = self._router, None
        if router is not None:
            end_sessions([router.process])
        super().stop()
        if self._plan is not None:
            shutil.rmtree(self._copy, ignore_errors=True)


def start_router(urls: Sequence[str], log: Path, settings: SGLangConfig, device: str) -> ServerProcess:
    """Start sglang-router in front of running servers, and return without waiting for it.

    Args:
        urls: URLs of the servers.
        log: file for the router's output.
        settings: the section `rollout.sglang`.
        device: cpu or cuda.
    """

    def command(port: int) -> list[str]:
        flags = ["--worker-urls", *urls, "--host", "127.0.0.1", "--port", str(port)]
        # A request that the router retries would be sampled twice. By default all routers use the same metrics port.
        flags += ["--policy", "round_robin", "--disable-retries", "--prometheus-port", str(free_port())]
        return _guarded(settings, "sglang_router.launch_router", flags)

    return ServerProcess("sglang-router", command, log, inherited_environment(device) | server_environment(device))


def _guarded(settings: SGLangConfig, module: str, flags: list[str]) -> list[str]:
    # -I: the guard runs in this interpreter, and the server's PYTHONPATH must not apply to it.
    guard = [sys.executable, "-I", str(Path(__file__).parent / "subreaper.py"), str(os.getpid())]
    return [*guard, str(settings.python.absolute()), "-m", module, *flags]


def inherited_environment(device: str) -> dict[str, str]:
    """Return this process's environment without what makes it a trainer. `device` is cpu or cuda.

    On a GPU the trainer has one thread a rank, one connection to its device, and an allocator and kernels of its own
    choice. A server would be slower with the first two; its memory saver does not work with some allocators.
    """
    found = environment_of_servers()
    if device == "cpu":
        return found
    return {name: value for name, value in found.items() if name not in _OF_A_GPU_TRAINER and name[:5] != "NVTE_"}


def server_environment(device: str) -> dict[str, str]:
    """Return the variables that a server needs in addition to those of its parent."""
    # A request for several samples cannot be aborted by its id. SGLang ends it when it detects the disconnection.
    env = {"SGLANG_REQUEST_STATE_WAIT_TIMEOUT": "1"}
    # Compiling all shapes of block-FP8 products ahead takes 10 to 20 minutes at the first start. They are compiled when
    # they are first used.
    env |= {"SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0"} if device != "cpu" else {}
    if device == "cpu":
        env |= _CPU_ENVIRONMENT
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_CPU_SITE), os.environ.get("PYTHONPATH")]))
    return env


def write_as_sent(model_dir: Path, plan: PrecisionPlan, dest: Path) -> None:
    """Write a model folder with the weights that a trainer would send to its engines.

    Args:
        model_dir: the folder that the trainer loads.
        plan: the precision plan.
        dest: the folder to write.

    Raises:
        CheckpointError: as from `HFFolder`, `WireTensors` and `write_hf_folder`, or if there is no free space.
    """
    source = check_folder(HFFolder(model_dir))
    dtypes = export_dtypes(plan, source)
    stream = ((name, source.read(name).to(dtypes[name])) for name in source.tensors)
    sent = ((name, tensor) for name, tensor in WireTensors(stream, plan) if tensor is not None)
    try:
        write_hf_folder(dest, sent, source, quantization=quantization_config(plan, source.tensors))
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{dest} cannot be written ({error}): free space there or choose another run.dir") from error
