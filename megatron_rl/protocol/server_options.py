"""Options of an embedded server, declared once for the command line, the code that starts a server, and the server."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from megatron_rl.config import PrecisionConfig
from megatron_rl.errors import UserError
from megatron_rl.precision.plan import DTYPES, WIRE, PrecisionPlan, refuse_contradictions, resolve

ACTIVATIONS = ("none", "fp8", "fp4")


@dataclass(frozen=True)
class EngineQuantization:
    """The low precision of an engine, with the values of the `precision` section.

    Attributes:
        quantization: format of the weights, as `precision.rollout`.
        activations: format of the inputs of quantized layers, as `precision.rollout_activations`.
        first_last_bf16: the first and the last layer are not quantized.
        trainer_dtype: a tensor that arrives unquantized is rounded to this dtype before it is quantized. The weights
            that an engine starts from then have the codes that the trainer would send.
    """

    quantization: str
    activations: str = "none"
    first_last_bf16: bool = False
    trainer_dtype: str = "bf16"

    def __post_init__(self) -> None:
        if self.quantization not in WIRE:
            raise UserError(f"--quantization '{self.quantization}' is not one of {['none', *WIRE]}")

    @classmethod
    def of(cls, precision: PrecisionConfig) -> Self | None:
        """Return the quantization of a run's engines, None if their weights are not quantized. Raises ConfigError."""
        refuse_contradictions(precision)
        if precision.rollout not in WIRE:
            return None
        return cls(precision.rollout, precision.rollout_activations, precision.first_last_bf16, precision.train)

    @property
    def flags(self) -> list[str]:
        """Arguments of the embedded server's command line."""
        flags = [
            "--quantization",
            self.quantization,
            "--activations",
            self.activations,
            "--trainer-dtype",
            self.trainer_dtype,
        ]
        return [*flags, "--first-last-bf16"] if self.first_last_bf16 else flags

    def plan(self, num_layers: int, dtype: str) -> PrecisionPlan:
        """Return the precision plan of an engine that computes in `dtype`."""
        precision = PrecisionConfig(
            train=self.trainer_dtype,
            rollout=self.quantization,
            rollout_activations=self.activations,
            first_last_bf16=self.first_last_bf16,
        )
        plan = resolve(precision, num_layers, engine="embedded", device="cpu")
        inputs = dtype if self.activations == "none" else plan.engine_inputs
        return replace(plan, engine=dtype, engine_inputs=inputs, kv_cache=dtype)


def describe_precision(dtype: str, engine_quantization: EngineQuantization | None) -> dict[str, Any]:
    """Return the fields of /model_info that describe an engine's precision."""
    none = dict.fromkeys(("quantization", "activations", "first_last_bf16", "trainer_dtype"))
    return {"dtype": dtype, **(none if engine_quantization is None else asdict(engine_quantization))}


def parse_quantization(
    quantization: str, activations: str, first_last_bf16: bool, trainer_dtype: str
) -> EngineQuantization | None:
    """Return the quantization of a command line, None without one.

    Args:
        quantization: format of the weights, or "none".
        activations: format of the inputs of quantized layers, or "none".
        first_last_bf16: the first and the last layer are not quantized.
        trainer_dtype: as in `EngineQuantization`.

    Raises:
        UserError: a value is unknown, or an option needs another one.
    """
    for flag, given, known in (
        ("activations", activations, ACTIVATIONS),
        ("trainer-dtype", trainer_dtype, tuple(DTYPES)),
    ):
        if given not in known:
            raise UserError(f"--{flag} '{given}' is not one of {list(known)}")
    if quantization != "none":
        return EngineQuantization(quantization, activations, first_last_bf16, trainer_dtype)
    if activations != "none":
        raise UserError(
            f"--activations {activations} needs quantized weights: give --quantization fp8_blockwise with it"
        )
    if first_last_bf16:
        raise UserError(
            "--first-last-bf16 spares layers of quantized weights, and there are none: give --quantization with it"
        )
    return None


@dataclass(frozen=True)
class ServerOptions:
    """The options with which an embedded server is started.

    Attributes:
        model: Hugging Face folder.
        host: address to listen on; one that is not loopback needs a key.
        port: port to listen on.
        dtype: dtype of weights that are not quantized and of activations: fp32, bf16 or fp16.
        threads: torch threads; 0: torch's choice.
        deterministic: every request is its own batch.
        weight_version: version of the weights as loaded.
        device: cpu or cuda.
        max_rows: samples decoded together.
        parent_pid: end with this parent process; 0: do not. Linux only.
        quantization: quantization of weights and inputs; None: none.
        api_key_file: file with the key that every request must carry, but `/health`; None: no key.
        ready_file: file that is written once the server responds; None: none.
        save_dirs: folders below which `/save_weights` may write.

    Raises:
        UserError: a number is outside its range.
    """

    model: Path
    host: str = "127.0.0.1"
    port: int = 30000
    dtype: str = "fp32"
    threads: int = 0
    deterministic: bool = False
    weight_version: str = "default"
    device: str = "cpu"
    max_rows: int = 512
    parent_pid: int = 0
    quantization: EngineQuantization | None = None
    api_key_file: Path | None = None
    ready_file: Path | None = None
    save_dirs: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        for name, low, high in (("port", 0, 65535), ("threads", 0, 4096), ("max_rows", 1, 1 << 20)):
            if not low <= getattr(self, name) <= high:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {getattr(self, name)} is outside {low} to {high}")

    @property
    def arguments(self) -> Sequence[str]:
        """The arguments of `megatron-rl` that start this server."""
        arguments = ["serve", "--model", str(self.model)]
        for name in ("host", "port", "dtype", "threads", "weight_version", "device", "max_rows", "parent_pid"):
            arguments += [f"--{name.replace('_', '-')}", str(getattr(self, name))]
        for name in ("api_key_file", "ready_file"):
            path = getattr(self, name)
            arguments += [] if path is None else [f"--{name.replace('_', '-')}", str(path)]
        for folder in self.save_dirs:
            arguments += ["--save-dir", str(folder)]
        arguments += ["--deterministic"] if self.deterministic else []
        return arguments + (self.quantization.flags if self.quantization else [])
