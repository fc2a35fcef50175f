"""Device port: megatron-core 0.16.1 on a torch without CUDA.

megatron-core uses CUDA in only a few places (buffers, RNG state, scalars for the gradient norm). `PORTED_MODULES` lists
each module that does. In these modules, and nowhere else, the name `torch` is replaced by a view of torch whose
allocations and `torch.cuda` calls use the CPU. `TENSOR_METHOD_SITES` lists the functions that call `tensor.cuda()` or
compare `tensor.type()` with `torch.cuda.*`. torch's compiler is not imported: its import takes seconds, and on a CPU
nothing uses it. With CUDA nothing is installed, and the same project code runs on the GPU.
"""

import contextlib
import functools
import importlib
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_rl.errors import ConfigError

PORTED_MODULES = {
    "megatron.core.tensor_parallel.layers": "parameters and all-gather buffers of the sharded linears",
    "megatron.core.tensor_parallel.mappings": "receive buffers of all-gather and reduce-scatter",
    "megatron.core.tensor_parallel.random": "RNG states of the tracker and of recomputation",
    "megatron.core.models.common.embeddings.rotary_pos_embedding": "inverse frequencies moved to the device",
    "megatron.core.models.common.language_module.language_module": "tied embedding on the last pipeline stage",
    "megatron.core.transformer.attention": "parameters built on the current device",
    "megatron.core.distributed.param_and_grad_buffer": "gradient and parameter buffers",
    "megatron.core.transformer.moe.router": "the router's weight",
    "megatron.core.transformer.moe.token_dispatcher": "the side stream of copies to the host",
    "megatron.core.optimizer": "AdamW without torch's compiler",
    "megatron.core.optimizer.optimizer": "scale and overflow scalars",
    "megatron.core.optimizer.grad_scaler": "the loss scale",
    "megatron.core.optimizer.clip_grads": "gradient-norm scalars",
    "megatron.core.optimizer.distrib_optimizer": "sharded optimizer state",
    "megatron.core.pipeline_parallel.schedules": "token counter",
    "megatron.core.pipeline_parallel.p2p_communication": "receive buffers between pipeline stages",
    "megatron.core.utils": "l2-norm and global memory buffers",
    "megatron.core.parallel_state": "barriers of group creation",
    "megatron.core.dist_checkpointing.strategies.async_utils": "synchronize before fork; liveness flags",
    "megatron.core.dist_checkpointing.strategies.filesystem_async": "synchronize after the copy to host",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver": "verification flags",
    "megatron.core.dist_checkpointing.strategies.fully_parallel": "synchronize after the exchange",
    "megatron.core.dist_checkpointing.exchange_utils": "exchanged shards",
}
TENSOR_METHOD_SITES = (
    ("megatron.core.models.common.language_module.language_module", "LanguageModule.setup_embeddings_and_output_layer"),
    ("megatron.core.optimizer.optimizer", "clip_grad_by_total_norm_fp32"),
    ("megatron.core.optimizer.clip_grads", "clip_grad_by_total_norm_fp32"),
    ("megatron.core.optimizer.grad_scaler", "DynamicGradScaler.load_state_dict"),
    ("megatron.core.optimizer.optimizer", "Float16OptimizerWithFloat16Params.__init__"),
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer._build_model_and_main_param_groups"),
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer._get_model_param_range_map"),
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer.__init__"),
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer.get_parameter_state_dp_zero"),
)
_JIT = "megatron.core.jit"
_CPU = torch.device("cpu")
_installed = False


def stand_in_for_jit() -> None:
    """Replace `megatron.core.jit` by a module that compiles nothing. Do nothing if CUDA exists.

    This must run before the first import of megatron.core, which decorates functions with `jit_fuser` while it is
    imported. `jit_fuser` is `torch.compile`, and importing the compiler takes 3 s. On a CPU nothing that runs needs it.
    megatron-core's own `disable_jit_fuser` can only be called after the import.
    """
    if torch.cuda.is_available() or _JIT in sys.modules:
        return
    stand_in = types.ModuleType(_JIT, "megatron-core's jit module, in which `jit_fuser` changes nothing.")
    stand_in.__dict__.update(
        jit_fuser=_as_it_is, noop_decorator=_as_it_is, enable_jit_fuser=_do_nothing, disable_jit_fuser=_do_nothing
    )
    sys.modules[_JIT] = stand_in


def pick_device(requested: str) -> torch.device:
    """Return the device of this rank for `run.device`. Without CUDA, install the CPU port.

    Raise ConfigError for "cuda" without a CUDA device, so that a run never moves to the CPU silently.
    """
    if requested == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "run.device is cuda, but torch sees no CUDA device: set run.device to cpu or auto, or repair the driver"
        )
    if requested != "cpu" and torch.cuda.is_available():
        # A launcher may show every rank one GPU alone; that GPU is number 0 for each of them.
        index = gpu_of_rank(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count())
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        return device
    if torch.cuda.is_available():
        raise ConfigError(
            "run.device is cpu on a machine with CUDA: hide the devices with CUDA_VISIBLE_DEVICES= instead"
        )
    install_cpu_port()
    return _CPU


def gpu_of_rank(local_rank: int, gpus: int) -> int:
    """Return the number of the GPU of a rank among those that it sees. Raises ConfigError if there is none for it."""
    if gpus == 1:
        return 0
    if local_rank >= gpus:
        raise ConfigError(
            f"LOCAL_RANK is {local_rank}, and torch sees {gpus} GPUs (numbers 0 to {gpus - 1}): start at most one rank "
            "a GPU, or hide the GPUs (CUDA_VISIBLE_DEVICES=)"
        )
    return local_rank


def install_cpu_port() -> None:
    """Redirect the call sites listed above. Do nothing if CUDA exists, or on a second call."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    view = _cpu_view()
    for name in PORTED_MODULES:
        module: Any = importlib.import_module(name)
        module.torch = view
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = _as_host_value
    # It takes a stand-in for Transformer Engine's class for the class itself.
    latent: Any = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    latent.HAVE_TE = False
    # Without Transformer Engine, 0.19 does not import the linear whose weight every rank holds, and refuses it then.
    latent.Linear = importlib.import_module("megatron.core.post_training.modelopt.layers").Linear
    for name, path in TENSOR_METHOD_SITES:
        owner: Any = importlib.import_module(name)
        *parents, attribute = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        found = owner.__dict__[attribute]
        if isinstance(found, classmethod):
            setattr(owner, attribute, classmethod(_tensors_count_as_cuda(found.__func__)))
        else:
            setattr(owner, attribute, _tensors_count_as_cuda(found))
    _installed = True


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _do_nothing() -> None:
    return None


class _View(types.ModuleType):
    """A view of another module in which a few names are replaced. Attributes of the other module are cached."""

    def __init__(self, base: Any, **replaced: Any) -> None:
        super().__init__(base.__name__)
        self.__dict__.update(replaced)
        self.__dict__["_base"] = base

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_base"], name)
        self.__dict__[name] = value
        return value


def _cpu_view() -> types.ModuleType:
    def on_cpu(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(function)
        def allocate(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
            return function(*args, device=_CPU if str(device).startswith("cuda") else device, **kwargs)

        return allocate

    random = _View(torch.cuda.random, get_rng_state=lambda device="cuda": torch.get_rng_state())
    cuda = _View(
        torch.cuda,
        current_device=lambda: _CPU,
        synchronize=lambda device=None: None,
        empty_cache=lambda: None,
        get_rng_state=lambda device="cuda": torch.get_rng_state(),
        set_rng_state=lambda state, device="cuda": torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
        random=random,
        Stream=_Stream,
        stream=contextlib.nullcontext,
        current_stream=_Stream,
    )
    allocators = {
        name: on_cpu(getattr(torch, name)) for name in ("tensor", "zeros", "ones", "empty", "full", "empty_like")
    }
    return _View(torch, cuda=cuda, optim=_View(torch.optim, AdamW=_EagerAdamW), **allocators)


def _undecorated(method: Callable[..., Any]) -> Callable[..., Any]:
    return getattr(method, "__wrapped__", method)


class _EagerAdamW(torch.optim.AdamW):
    """AdamW without the decorators that import torch's compiler at the first call (1.5 s in every rank).

    They exclude methods from compilation, and mark graph breaks around `step`. Nothing is compiled here.
    """

    add_param_group = _undecorated(torch.optim.Optimizer.add_param_group)
    load_state_dict = _undecorated(torch.optim.Optimizer.load_state_dict)
    state_dict = _undecorated(torch.optim.Optimizer.state_dict)
    zero_grad = _undecorated(torch.optim.Optimizer.zero_grad)

    def step(self, closure: Any = None) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return _undecorated(torch.optim.AdamW.step)(self, closure)


class _Stream:
    """Stream of a CPU, which computes in one order: there is nothing to wait for."""

    def wait_stream(self, stream: "_Stream") -> None:
        return None

    def record_event(self) -> "_Stream":
        return self

    def synchronize(self) -> None:
        return None


def _as_host_value(value: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Replace megatron-core's `maybe_move_tensor_to_cpu`, which never converts a CPU tensor to numpy."""
    return value.numpy() if as_numpy and isinstance(value, torch.Tensor) else value


class _TensorsCountAsCuda(TorchFunctionMode):
    """Mode in which a CPU tensor's `.cuda()` returns it, and its `.type()` returns `torch.cuda.FloatTensor`."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.cuda:
            return args[0]
        result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.type and len(args) == 1 and not kwargs and not result.startswith("torch.cuda."):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _tensors_count_as_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def ported(*args: Any, **kwargs: Any) -> Any:
        with _TensorsCountAsCuda():
            return function(*args, **kwargs)

    return ported
