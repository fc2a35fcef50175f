"""What the trainer may ask of one engine besides generation: SGLang's control calls, and a few of the embedded server's."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from megatron_rl.errors import EngineError
from megatron_rl.protocol.generation import error_message


@dataclass(frozen=True, slots=True)
class Traits:
    """What weight sync must know of an engine. embedded: stages updates, can take one back, and gives the digests of what
    it received. ranks: processes that hold a part of the model. device: `cpu` or `cuda`. dtype: of its unquantized weights.
    quantized: it quantizes weights."""

    embedded: bool
    ranks: int
    device: str
    dtype: str
    quantized: bool


class Controls(ABC):
    """Control calls; each raises EngineError with the server's words when it refuses or does not answer."""

    @abstractmethod
    def _control(
        self, url: str, path: str, body: dict[str, Any] | None, *, repeat: bool = True, method: str = "POST"
    ) -> Any:
        """The JSON answer. repeat: a lost connection may be tried again. `body` None with GET."""

    def pause(self, url: str, mode: str) -> None:
        """mode: "abort" ends requests, "retract" requeues them, "in_place" keeps them with their cache."""
        self._control(url, "/pause_generation", {"mode": mode})

    def resume(self, url: str) -> None:
        self._control(url, "/continue_generation", {})

    def flush(self, url: str) -> None:
        self._control(url, "/flush_cache", {})

    def release_memory(self, url: str) -> None:
        """Have an idle server give the memory of weights and cache back; it generates nothing until it has new weights."""
        self._control(url, "/release_memory_occupation", {}, repeat=False)

    def resume_memory(self, url: str) -> None:
        """Have the server take its memory again; its weights are undefined until the next update. SGLang dies of a second
        time."""
        self._control(url, "/resume_memory_occupation", {}, repeat=False)

    # Weights ------------------------------------------------------------------------------------------------

    def update_weights_from_disk(self, url: str, folder: Path, version: int) -> None:
        """Serve the weights in `folder` as `version`; EngineError with the server's words when it refuses.

        The cache is left alone: SGLang would answer 400, the new weights in place, where requests hold some of it.
        """
        body = {"model_path": str(Path(folder).absolute()), "weight_version": str(version), "flush_cache": False}
        self._control(url, "/update_weights_from_disk", body)

    def begin_update(self, url: str) -> None:
        """Open an update of which the weights come in buckets."""
        self._control(url, "/begin_weight_update", {"selector": "all"}, repeat=False)

    def end_update(self, url: str) -> None:
        """Close it; the embedded server serves the new weights from here on, SGLang since each bucket."""
        self._control(url, "/end_weight_update", {}, repeat=False)

    def abort_update(self, url: str) -> None:
        """Have an embedded server forget the update under way, or go back from one that ended while it is still paused."""
        self._control(url, "/abort_weight_update", {})

    def join_update_group(
        self, url: str, address: str, port: int, *, rank: int, world: int, name: str, backend: str
    ) -> None:
        """Returns when the group is complete. rank: of the engine's first process."""
        body = {"master_address": address, "master_port": port, "rank_offset": rank, "world_size": world}
        self._control(url, "/init_weights_update_group", {**body, "group_name": name, "backend": backend}, repeat=False)

    def leave_update_group(self, url: str, name: str) -> None:
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
        """Have the engine take part in one broadcast of a flattened bucket; returns when it has it.

        version: with the last bucket of an update."""
        body = {"names": list(names), "dtypes": list(dtypes), "shapes": [list(shape) for shape in shapes]}
        body |= {"group_name": group, "load_format": "flattened_bucket", **_common(version)}
        self._control(url, "/update_weights_from_distributed", body, repeat=False)

    def load_tensors(self, url: str, payloads: Sequence[str], version: int | None) -> None:
        """Have the engine take tensors of this machine's memory. payloads: one for each of its ranks, base64."""
        body = {"serialized_named_tensors": list(payloads), "load_format": None, **_common(version)}
        self._control(url, "/update_weights_from_tensor", body, repeat=False)

    def weight_version(self, url: str) -> str:
        """As the server names it; "default" for weights as SGLang loaded them."""
        return str(_field(self._model_info(url), "weight_version", url))

    def checksums(self, url: str) -> dict[str, str]:
        """Digest of every tensor: as an embedded server received it, or as SGLang holds it, fused and under SGLang's names,
        with `@rank` behind the name where the server has several ranks."""
        answer = self._control(url, "/weights_checker", {"action": "checksum"})
        if isinstance(answer, dict) and answer.get("ranks"):
            ranks = answer["ranks"]
            mark = (lambda rank: f"@{rank}") if len(ranks) > 1 else (lambda rank: "")
            return {
                name + mark(i): digest for i, rank in enumerate(ranks) for name, digest in rank["checksums"].items()
            }
        return dict(_field(answer, "checksums", url))

    def score(self, url: str, tokens: Sequence[int]) -> list[float]:
        """Log-probabilities of all tokens but the first, at temperature 1."""
        sampling = {"max_new_tokens": 0, "temperature": 1.0}
        body = {"input_ids": list(tokens), "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
        answer = self._control(url, "/generate", body, repeat=False)
        scored = _field(_field(answer, "meta_info", url), "input_token_logprobs", url)
        if [entry[1] for entry in scored] != list(tokens) or any(entry[0] is None for entry in scored[1:]):
            raise EngineError(f"{url} did not score the tokens it was given")
        return [float(entry[0]) for entry in scored[1:]]

    def save_weights(self, url: str, folder: Path) -> None:
        """Have an embedded server write what it holds to `model.safetensors` in `folder`; EngineError where it cannot."""
        self._control(url, "/save_weights", {"path": str(Path(folder).absolute())})

    # What the server says of itself -------------------------------------------------------------------------

    def info(self, url: str) -> dict[str, Any]:
        """What the server says of itself: /model_info, and /server_info where the former does not name the precision."""
        answer = dict(self._model_info(url))
        return answer if "dtype" in answer else {**self._control(url, "/server_info", None, method="GET"), **answer}

    def traits(self, url: str) -> Traits:
        """See `Traits`. EngineError where the server does not say."""
        found = self.info(url)
        embedded = found.get("engine") == "embedded"
        ranks = 1 if embedded else int(_field(found, "tp_size", url)) * int(found.get("pp_size") or 1)
        device = str(found.get("device", "cpu") if embedded else _field(found, "device", url))
        dtype = str(_field(found, "dtype", url))
        return Traits(embedded, ranks, device, dtype, quantized=found.get("quantization") is not None)

    def memory(self, url: str) -> str | None:
        """Of the weights: "held", "released", or "empty" (taken back, nothing in it yet); None where a server does not say."""
        answer = self._model_info(url)
        return answer.get("memory") if isinstance(answer, dict) else None

    def holds_weights(self, url: str) -> bool:
        """False for a server that says its memory was given back; True where a server does not say."""
        return self.memory(url) in ("held", None)

    def _model_info(self, url: str) -> Any:
        return self._control(url, "/model_info", None, method="GET")


def _common(version: int | None) -> dict[str, Any]:
    # The cache is dropped once, when the update is complete.
    return {"flush_cache": False} | ({} if version is None else {"weight_version": str(version)})


def refusal_error(url: str, path: str, response: httpx.Response) -> EngineError:
    """The error for an answer other than 200."""
    if response.status_code != 404:
        return EngineError(f"{url}{path} refused the request ({response.status_code}): {error_message(response)}")
    able = "" if path in ("/save_weights", "/abort_weight_update") else ", or an SGLang of a version that has it"
    return EngineError(f"{url} has no {path} (404): name a server of `megatron-rl serve`{able} in rollout.urls")


def _field(answer: Mapping[str, Any], name: str, url: str) -> Any:
    if not isinstance(answer, Mapping) or name not in answer:
        raise EngineError(f"{url} does not name its '{name}': {str(answer)[:200]}")
    return answer[name]
