"""Embedded generation engine: transformers models, continuous batching, versioned weights.

One thread owns the model, the cache and all requests. Other threads pass work to it through a queue.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from megatron_rl.errors import EngineError, UserError
from megatron_rl.precision.plan import DTYPES
from megatron_rl.protocol.server_options import EngineQuantization
from megatron_rl.server.batcher import Batcher
from megatron_rl.server.call_queue import CallQueue
from megatron_rl.server.decode_batch import Job
from megatron_rl.server.model_settings import eos_ids, read_config, read_tokenizer
from megatron_rl.server.model_weights import Weights, build_weights, read_weights, tied_names
from megatron_rl.server.weight_updates import PendingUpdate, UpdateGroups, WeightUpdates
from megatron_rl.weights.quantized import is_scale

PauseMode = Literal["abort", "retract", "in_place"]
_RELEASED = "the engine's memory is released: POST /resume_memory_occupation, then update its weights"
_EMPTY = "the engine's memory was released and holds no weights yet: update them first"
_log = logging.getLogger(__name__)

# The requests of one training step arrive one by one within milliseconds. To prefill them together is much cheaper.
_QUIET_S, _OVERDUE_S = 0.002, 0.05


class JobFailed(EngineError):
    """One request could not be computed. The engine goes on."""


class Engine:
    """Embedded engine for a Hugging Face folder. Call `start`, then `submit` jobs from any thread.

    Attributes:
        updates: weight updates in buckets.
        paused: generation is paused.
        memory: state of the weights' memory: "held"; "released"; "empty" (allocated again, without weights).
        failure: the error that ended the engine's thread; empty while it runs.
    """

    def __init__(
        self,
        model_dir: Path | str,
        dtype: str = "fp32",
        threads: int = 0,
        deterministic: bool = False,
        weight_version: str = "default",
        device: str = "cpu",
        max_rows: int = 512,
        max_prefill_tokens: int = 16384,
        engine_quantization: EngineQuantization | None = None,
    ) -> None:
        """Load the model.

        Args:
            model_dir: the Hugging Face folder.
            dtype: dtype of weights, activations and cache: "fp32", "bf16" or "fp16".
            threads: torch threads of this engine; 0: torch's choice.
            deterministic: every request is its own batch, never joined and never compacted. A sample then depends only
                on weights, prompt, n and seed.
            weight_version: version of the weights as loaded.
            device: cpu or cuda.
            max_rows: number of samples decoded together.
            max_prefill_tokens: token limit of one prefill.
            engine_quantization: quantization of weights and inputs. It is emulated: weights are held as the values of
                their codes. None: weights are served as they come, cast to `dtype`.

        Raises:
            UserError: the dtype is unknown.
            CheckpointError: a file of the folder is missing, damaged or contradicts another one.
        """
        if dtype not in DTYPES:
            raise UserError(f"engine dtype '{dtype}' is not one of {sorted(DTYPES)}")
        self.model_dir, self.dtype, self.threads, self.deterministic = Path(model_dir), dtype, threads, deterministic
        if threads:
            torch.set_num_threads(threads)
        self.config = read_config(self.model_dir)
        self._device = torch.device(device)
        self.engine_quantization = engine_quantization
        self._plan = (
            None if engine_quantization is None else engine_quantization.plan(int(self.config.num_hidden_layers), dtype)
        )
        weights = read_weights(self.model_dir, self.config, DTYPES[dtype], self._device, plan=self._plan)
        self._shapes = weights.shapes
        self.tokenizer = read_tokenizer(self.model_dir)
        self.eos_ids = eos_ids(self.model_dir, self.config, self.tokenizer)
        self.vocab_size = int(self.config.vocab_size)
        self.context = int(getattr(self.config, "max_position_embeddings", 0) or 1 << 30)
        self._batcher = Batcher(
            weights,
            weight_version,
            self._device,
            self._deliver,
            self._fail,
            deterministic=deterministic,
            max_rows=max_rows,
            max_prefill_tokens=max_prefill_tokens,
        )
        self._calls = CallQueue(self._check_alive)
        self._swaps: deque[tuple[Weights, str, Future[tuple[Weights, str] | None]]] = deque()
        self.updates = WeightUpdates(self._begin_update, self._received, self._serve, UpdateGroups(self._device))
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._first_arrival = self._last_arrival = 0.0
        self._stopping = False
        self.paused = False
        self.memory: Literal["held", "released", "empty"] = "held"
        self.failure = ""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # For other threads -------------------------------------------------------------------------------------

    def start(self) -> "Engine":
        """Start the engine's thread and return the engine."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread. Unfinished requests end as aborted."""
        self.updates.groups.leave_all()
        if self.healthy:
            self._calls.call(self._shut)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread runs without an error."""
        return self._thread.is_alive() and not self.failure

    @property
    def weight_version(self) -> str:
        """Version of the weights that are served."""
        return self._batcher.version

    def submit(self, jobs: Sequence[Job]) -> list["Future[Job]"]:
        """Queue all jobs, or none if one is refused. Return a future for each, whose result is the finished job."""
        rids = [job.rid for job in jobs]
        with self._lock:
            self._check_alive()
            self._check_weights()
            fresh = dict(zip(rids, jobs, strict=True))
            served = next((rid for rid in rids if rid in self._jobs), None)
            if served is None and len(fresh) < len(rids):
                served = Counter(rids).most_common(1)[0][0]
            if served is not None:
                raise UserError(f"field 'rid': request '{served}' is already being served")
            self._jobs.update(fresh)
        self._calls.put(lambda: self._enqueue(jobs))
        return [job.future for job in jobs]

    def pause(self, mode: PauseMode) -> None:
        """Pause generation.

        Mode "abort" ends all requests. "retract" puts them back into the queue and discards their cache. "in_place"
        keeps them with their cache.
        """
        self._calls.call(lambda: self._pause(mode))

    def resume(self) -> None:
        """Resume generation. An update that has ended can then no longer be undone."""
        self._calls.call(self._resume)
        self.updates.settle()

    def abort(self, rids: Collection[str] | None = None) -> int:
        """End these requests, or all of them. Partial outputs are kept. Return the number of ended requests."""
        return self._calls.call(lambda: self._batcher.abort(rids))

    def flush(self) -> None:
        """Discard the cached keys and values. Raises EngineError while requests hold some."""
        self._calls.call(self._batcher.flush)

    def checksums(self) -> tuple[str, dict[str, str]]:
        """Return the version served, and the digest of every tensor as it was received (before any cast), by name."""
        self._check_weights()
        return self._calls.call(lambda: (self._batcher.version, dict(self._batcher.weights.digests)))

    def save_weights(self, folder: Path) -> str:
        """Write the weights that the model computes with to `model.safetensors` in `folder`. Return the version served.

        The weights are dequantized, in the dtype in which they are held. `checksums` shows what was received; this file
        shows what the engine made of it. Raises EngineError if the file cannot be written or the model has experts.
        """
        self._check_weights()
        return self._calls.call(lambda: self._save(folder))

    def release_memory(self) -> None:
        """Release the memory of the weights. Raises EngineError while requests are being served.

        Nothing is generated until `resume_memory` is called and new weights have arrived.
        """
        self._calls.call(self._release)

    def resume_memory(self) -> None:
        """Accept weights again; the engine serves after the next update. Does nothing if nothing was released."""
        self._calls.call(self._take_back)

    def update_from_disk(self, folder: Path, version: str) -> None:
        """Check the weights of `folder`, then serve them as `version`.

        They are swapped when nothing runs or while paused. Raises CheckpointError naming the tensor or file. The old
        weights are then still served.
        """
        self._check_alive()
        if self.memory == "released":
            raise EngineError(_RELEASED)
        fresh = read_weights(
            folder,
            self.config,
            DTYPES[self.dtype],
            self._device,
            expected=self._shapes,
            version=version,
            plan=self._plan,
            like=self._model_held,
        )
        self._serve(fresh, version)

    def _begin_update(self) -> PendingUpdate:
        self._check_alive()
        if self.memory == "released":
            raise EngineError(_RELEASED)
        return PendingUpdate(self._shapes, tied_names(self.config))

    def _received(self, tensors: dict[str, torch.Tensor], digests: dict[str, str]) -> Weights:
        """Return a model made of tensors that were received in buckets. They are checked like those of a folder."""
        coded = self._plan is not None and any(is_scale(name) for name in tensors)
        return build_weights(
            tensors,
            digests,
            self.config,
            DTYPES[self.dtype],
            self._device,
            plan=self._plan,
            coded=coded,
            where="the weights received",
            expected=self._shapes,
            like=self._model_held,
        )

    @property
    def _model_held(self) -> PreTrainedModel | None:
        """The model that is served; None while its memory is released."""
        return self._batcher.weights.model if self.memory == "held" else None

    def _serve(self, weights: Weights, version: str) -> tuple[Weights, str] | None:
        """Swap the weights when nothing runs or while paused.

        Return the weights and version served before, if the engine is paused and held weights; else None.
        """
        swapped: Future[tuple[Weights, str] | None] = Future()
        self._calls.call(lambda: self._swaps.append((weights, version, swapped)))
        return swapped.result()

    # The thread --------------------------------------------------------------------------------------------

    def _check_weights(self) -> None:
        if self.memory != "held":
            raise EngineError(_RELEASED if self.memory == "released" else _EMPTY)

    def _check_alive(self) -> None:
        if not self.healthy:
            raise EngineError(f"the engine has stopped: {self.failure or 'it was shut down'}")

    def _run(self) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)  # the setting is per thread
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._turn()
        except Exception as error:  # noqa: BLE001 (thread boundary: waiting callers must get the error)
            _log.exception("the engine's thread ended")
            self.failure = f"{type(error).__name__}: {error}"
        self._fail_all()

    def _turn(self) -> None:
        """Do the queued work. Then swap weights, or admit waiting rows and decode one token."""
        self._take_work()
        batcher = self._batcher
        if self._swaps and (self.paused or batcher.running is None):
            fresh, version, swapped = self._swaps.popleft()
            before = (batcher.weights, batcher.version) if self.paused and self.memory == "held" else None
            batcher.swap(fresh, version)
            self.memory = "held"
            swapped.set_result(before)
        elif not self.paused and not self._stopping:
            # A pending swap waits only for the running rows. Rows that still wait get the new weights.
            if not self._swaps and batcher.has_room and time.monotonic() >= self._ready_at():
                batcher.admit()
            if batcher.running is not None:
                batcher.decode()

    def _take_work(self) -> None:
        idle = self.paused or self._batcher.running is None
        wait = None if idle and not self._swaps else 0.0
        if wait is None and self._batcher.waiting and not self.paused:
            wait = max(self._ready_at() - time.monotonic(), 0.0)
        self._calls.run_queued(wait)

    def _enqueue(self, jobs: Sequence[Job]) -> None:
        self._last_arrival = time.monotonic()
        if not self._batcher.waiting:
            self._first_arrival = self._last_arrival
        self._batcher.add(jobs)

    def _ready_at(self) -> float:
        return 0.0 if self.deterministic else min(self._last_arrival + _QUIET_S, self._first_arrival + _OVERDUE_S)

    def _pause(self, mode: PauseMode) -> None:
        if mode == "abort":
            self._batcher.abort(None)
        elif mode == "retract":
            self._batcher.retract()
        self.paused = True

    def _resume(self) -> None:
        self.paused = False

    def _save(self, folder: Path) -> str:
        held = self._batcher.weights.model.state_dict()
        fused = [name for name in self._shapes if name not in held]
        if fused:
            raise EngineError(
                f"tensor {fused[0]} is held in one with others: a model with experts cannot be given back"
            )
        file = folder / "model.safetensors"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if file.exists() and not file.is_file():  # a pipe would block this process until somebody reads from it
                raise EngineError(f"{file} is not a regular file: the weights are not written")
            tensors = {name: held[name].to("cpu", copy=True).contiguous() for name in self._shapes}
            save_file(tensors, file, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise EngineError(f"the weights cannot be written to {folder} ({error}): free space there") from error
        return self.weight_version

    def _release(self) -> None:
        with self._lock:  # no job may be accepted between the check of the queue and the release
            if self._jobs:
                raise EngineError(
                    f"{len(self._jobs)} requests are being served: abort them before the memory is released"
                )
            if self.memory == "held":
                self._batcher.release()
            self.memory = "released"

    def _take_back(self) -> None:
        if self.memory == "released":
            self.memory = "empty"

    def _deliver(self, job: Job) -> None:
        with self._lock:
            self._jobs.pop(job.rid, None)
        if job.future.set_running_or_notify_cancel():
            job.future.set_result(job)

    def _fail(self, job: Job, error: Exception) -> None:
        """End one request with its error. The engine serves the others."""
        _log.error("request '%s' failed", job.rid, exc_info=error)
        with self._lock:
            self._jobs.pop(job.rid, None)
        if job.future.set_running_or_notify_cancel():
            what = str(error).partition("\n")[0][:300]
            job.future.set_exception(JobFailed(f"request '{job.rid}' failed: {type(error).__name__}: {what}"))

    def _shut(self) -> None:
        self._batcher.abort(None)
        self._stopping = True

    def _fail_all(self) -> None:
        """Set the error on every unfinished future after the last turn, so that no caller waits forever."""
        with self._lock:
            self.failure = self.failure or "it was shut down"
            jobs, self._jobs = list(self._jobs.values()), {}
        error = EngineError(f"the engine has stopped: {self.failure}")
        for job in jobs:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)
        for _, _, swapped in self._swaps:
            swapped.set_exception(error)
