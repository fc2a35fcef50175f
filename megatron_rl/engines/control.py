"""Control calls to one engine: SGLang's, and a few that only the embedded server has."""

import asyncio
import secrets
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np

from megatron_rl.engines.http_call import Patience, call, put_off_error, says_later
from megatron_rl.errors import EngineError
from megatron_rl.files import parse_json
from megatron_rl.protocol.generation import GenerationRequest, SamplingParams, error_message, generate_body
from megatron_rl.protocol.responses import read_samples

T = TypeVar("T")
_RETRIES = 4
_BACKOFF_S = 0.1  # doubled at every retry
_LATER_S = 60.0  # time that a server may put a call off
_MAX_BYTES = 1 << 28  # of a response; the checksums of all tensors are the longest one


@dataclass(frozen=True, slots=True)
class Traits:
    """Properties of an engine that decide how weights are sent to it and confirmed.

    Attributes:
        embedded: whether it is an embedded server, which stages an update, can undo it, and reports the digests of what
            it received.
        ranks: number of processes that hold a part of the model.
        device: `cpu` or `cuda`.
        dtype: dtype of its unquantized weights.
        quantized: whether it quantizes weights.
    """

    embedded: bool
    ranks: int
    device: str
    dtype: str
    quantized: bool


class Controls(ABC):
    """Control calls. Each raises EngineError, with the server's message, if the server refuses or does not respond."""

    _http: httpx.AsyncClient

    @abstractmethod
    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop that the HTTP client belongs to, and return its result."""

    @abstractmethod
    def _base_url(self, url: str) -> str:
        """Return the base URL of an engine of the pool. Raises EngineError for another one."""

    def _control(
        self, url: str, path: str, body: dict[str, Any] | None, *, repeat: bool = True, method: str = "POST"
    ) -> Any:
        """Send one request and return the JSON response.

        Args:
            url: base URL of the engine.
            path: path of the call.
            body: JSON body; None with GET.
            repeat: retry the call after a lost connection.
            method: HTTP method.
        """
        reply = self._run(self._controlled(url, method, path, body, _RETRIES if repeat else 1))
        try:
            reply = parse_json(reply)
        except ValueError:
            return {}  # SGLang responds to some control calls in plain text
        if isinstance(reply, dict) and reply.get("success") is False:
            raise EngineError(f"{url}{path} failed: {reply.get('message', reply)}")
        return reply

    async def _controlled(self, url: str, method: str, path: str, body: dict[str, Any] | None, attempts: int) -> bytes:
        url = self._base_url(url)
        later, attempt = Patience(_LATER_S), 0
        while True:
            try:
                response = await call(self._http, method, f"{url}{path}", json=body, max_bytes=_MAX_BYTES)
            except httpx.TransportError as error:
                attempt += 1
                if attempt == attempts or isinstance(error, httpx.ReadTimeout):  # slow work is not requested twice
                    raise EngineError(
                        f"{url}{path} does not respond: {type(error).__name__} {error}".strip()
                    ) from error
                await asyncio.sleep(_BACKOFF_S * 2 ** (attempt - 1))
                continue
            except httpx.HTTPError as error:
                raise EngineError(f"{url}{path} sent what is no HTTP response: {error}") from error
            if not says_later(response):
                break
            if not await later.wait(response):
                raise put_off_error(url, path, response, later.limit_s)
        if response.status_code != 200:
            raise refusal_error(url, path, response)
        return response.content

    def pause(self, url: str, mode: str) -> None:
        """Pause generation.

        Mode "abort" ends requests, "retract" requeues them, "in_place" keeps them with their cache.
        """
        self._control(url, "/pause_generation", {"mode": mode})

    def resume(self, url: str) -> None:
        """Resume generation after `pause`."""
        self._control(url, "/continue_generation", {})

    def flush(self, url: str) -> None:
        """Discard the cached keys and values."""
        self._control(url, "/flush_cache", {})

    def release_memory(self, url: str) -> None:
        """Release the memory of weights and cache of an idle server. It generates nothing until it has new weights."""
        self._control(url, "/release_memory_occupation", {}, repeat=False)

    def resume_memory(self, url: str) -> None:
        """Let the server allocate its memory again. Its weights are undefined until the next update.

        SGLang crashes on a second call.
        """
        self._control(url, "/resume_memory_occupation", {}, repeat=False)

    # Weights ------------------------------------------------------------------------------------------------

    def update_weights_from_disk(self, url: str, folder: Path, version: int) -> None:
        """Load the weights in `folder` and serve them as `version`.

        The cache is not flushed. If requests hold a part of it, SGLang would return 400 although the new weights are
        loaded.

        Args:
            url: base URL of the engine.
            folder: model folder, which the engine must be able to read.
            version: the weight version.

        Raises:
            EngineError: with the server's message, if it refuses.
        """
        body = {"model_path": str(Path(folder).absolute()), "weight_version": str(version), "flush_cache": False}
        self._control(url, "/update_weights_from_disk", body)

    def begin_update(self, url: str) -> None:
        """Begin an update whose weights are sent in buckets."""
        self._control(url, "/begin_weight_update", {"selector": "all"}, repeat=False)

    def end_update(self, url: str) -> None:
        """End the update. The embedded server serves the new weights from now on.

        SGLang has served each bucket since its arrival.
        """
        self._control(url, "/end_weight_update", {}, repeat=False)

    def abort_update(self, url: str) -> None:
        """Discard the update in progress of an embedded server.

        If the update has ended and the server is still paused, the server returns to the version before.
        """
        self._control(url, "/abort_weight_update", {})

    def join_update_group(
        self, url: str, address: str, port: int, *, rank: int, world: int, name: str, backend: str
    ) -> None:
        """Let the engine join a process group; return when the group is complete.

        Args:
            url: base URL of the engine.
            address: host of the group's store.
            port: port of the store.
            rank: rank of the engine's first process in the group.
            world: number of processes in the group.
            name: name of the group.
            backend: nccl or gloo.
        """
        body = {"master_address": address, "master_port": port, "rank_offset": rank, "world_size": world}
        self._control(url, "/init_weights_update_group", {**body, "group_name": name, "backend": backend}, repeat=False)

    def leave_update_group(self, url: str, name: str) -> None:
        """Let the engine leave the process group `name`."""
        self._control(url, "/destroy_weights_update_group", {"group_name": name})

    def receive_bucket(
        self,
        url: str,
        group: str,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        version: int | None,
    ) -> None:
        """Let the engine receive one flattened bucket by broadcast; return when it has the bucket.

        Args:
            url: base URL of the engine.
            group: name of the process group.
            names: names of the bucket's tensors.
            dtypes: their dtypes.
            shapes: their shapes.
            version: the weight version, with the last bucket of an update; None with the others.
        """
        body = {"names": list(names), "dtypes": list(dtypes), "shapes": [list(shape) for shape in shapes]}
        body |= {"group_name": group, "load_format": "flattened_bucket", **_common(version)}
        self._control(url, "/update_weights_from_distributed", body, repeat=False)

    def load_tensors(self, url: str, payloads: Sequence[str], version: int | None) -> None:
        """Let the engine load a flattened bucket from memory of this machine.

        Args:
            url: base URL of the engine.
            payloads: base64, one for each rank of the engine.
            version: the weight version, with the last bucket of an update; None with the others.
        """
        body = {"serialized_named_tensors": list(payloads), "load_format": "flattened_bucket", **_common(version)}
        self._control(url, "/update_weights_from_tensor", body, repeat=False)

    def weight_version(self, url: str) -> str:
        """Return the server's weight version; "default" for the weights that SGLang loaded at its start."""
        return str(_field(self._model_info(url), "weight_version", url))

    def checksums(self, url: str) -> dict[str, str]:
        """Return tensor name -> digest.

        An embedded server reports the tensors as it received them. SGLang reports them as it holds them: fused, under
        SGLang's names. `@rank` follows the name if the server has several ranks.
        """
        reply = self._control(url, "/weights_checker", {"action": "checksum"})
        ranks = reply.get("ranks") if isinstance(reply, dict) else None
        if not ranks:
            return _digests(_field(reply, "checksums", url), url)
        if not isinstance(ranks, list):
            raise EngineError(f"{url} reports the checksums of its ranks wrongly: {str(ranks)[:200]}")
        mark = (lambda rank: f"@{rank}") if len(ranks) > 1 else (lambda rank: "")
        return {
            name + mark(i): digest
            for i, rank in enumerate(ranks)
            for name, digest in _digests(_field(rank, "checksums", url), url).items()
        }

    def score(self, url: str, tokens: Sequence[int]) -> list[float]:
        """Return the log-probabilities of all tokens but the first, at temperature 1: N - 1 values for N tokens."""
        rid = f"score-{secrets.token_hex(8)}"
        request = GenerationRequest(rid, list(tokens), 1, SamplingParams(0), score_prompt=True)
        body = generate_body(request, rid) | {"input_ids": list(tokens)}
        content = self._run(self._controlled(url, "POST", "/generate", body, 1))
        (sample,) = read_samples(url, request, content)
        if sample.prompt_logprobs is None or not np.isfinite(sample.prompt_logprobs).all():
            raise EngineError(f"{url} gave the tokens scores that are not finite")
        return [float(score) for score in sample.prompt_logprobs]

    def save_weights(self, url: str, folder: Path) -> None:
        """Write an embedded server's weights to `model.safetensors` in `folder`. Raises EngineError if it fails."""
        self._control(url, "/save_weights", {"path": str(Path(folder).absolute())})

    # Server information --------------------------------------------------------------------------------------

    def info(self, url: str) -> dict[str, Any]:
        """Return /model_info of the server, together with /server_info if /model_info does not hold the precision."""
        found = _object(self._model_info(url), "/model_info", url)
        if "dtype" in found:
            return found
        more = _object(self._control(url, "/server_info", None, method="GET"), "/server_info", url)
        return {**more, **found}

    def traits(self, url: str) -> Traits:
        """Return the traits of an engine. Raises EngineError if the server does not report them."""
        found = self.info(url)
        embedded = found.get("engine") == "embedded"
        ranks = (
            1
            if embedded
            else _count(found, "tp_size", url) * _count({"pp_size": found.get("pp_size") or 1}, "pp_size", url)
        )
        device = str(found.get("device", "cpu") if embedded else _field(found, "device", url))
        dtype = str(_field(found, "dtype", url))
        return Traits(embedded, ranks, device, dtype, quantized=found.get("quantization") is not None)

    def memory(self, url: str) -> str | None:
        """Return the state of the weights' memory; None if the server does not report it.

        The states are "held", "released" and "empty" (allocated again, without weights).
        """
        reply = self._model_info(url)
        return reply.get("memory") if isinstance(reply, dict) else None

    def holds_weights(self, url: str) -> bool:
        """Return whether the server holds weights. True if it does not report the state of its memory."""
        return self.memory(url) in ("held", None)

    def _model_info(self, url: str) -> Any:
        return self._control(url, "/model_info", None, method="GET")


def _common(version: int | None) -> dict[str, Any]:
    # The cache is flushed once, when the update is complete.
    return {"flush_cache": False} | ({} if version is None else {"weight_version": str(version)})


def refusal_error(url: str, path: str, response: httpx.Response) -> EngineError:
    """Return the error for a response whose status is not 200.

    Args:
        url: base URL of the engine.
        path: path of the call.
        response: the response.
    """
    if response.status_code in (401, 403):
        return EngineError(
            f"{url} wants another API key ({response.status_code}): set rollout.api_key_file to the file with the key "
            "that this engine was started with"
        )
    if response.status_code != 404:
        return EngineError(f"{url}{path} refused the request ({response.status_code}): {error_message(response)}")
    able = "" if path in ("/save_weights", "/abort_weight_update") else ", or an SGLang of a version that has it"
    return EngineError(f"{url} has no {path} (404): name a server of `megatron-rl serve`{able} in rollout.urls")


def _object(reply: Any, path: str, url: str) -> dict[str, Any]:
    if not isinstance(reply, dict):
        raise EngineError(f"{url}{path} is no JSON object: {str(reply)[:200]}")
    return reply


def _field(reply: Any, name: str, url: str) -> Any:
    if not isinstance(reply, Mapping) or name not in reply:
        raise EngineError(f"{url} does not name its '{name}': {str(reply)[:200]}")
    return reply[name]


def _count(reply: dict[str, Any], name: str, url: str) -> int:
    number = _field(reply, name, url)
    if not isinstance(number, int) or number < 1:
        raise EngineError(f"{url} reports '{name}' as {str(number)[:200]!r}, which is no number of processes")
    return number


def _digests(reply: Any, url: str) -> dict[str, str]:
    if not isinstance(reply, dict) or not all(isinstance(digest, str) for digest in reply.values()):
        raise EngineError(f"{url} reports its checksums wrongly: {str(reply)[:200]}")
    return reply
