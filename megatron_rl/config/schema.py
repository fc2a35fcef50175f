"""The keys of the configuration: a class is a section, a field is a key.

A configuration is frozen and validated once, before any allocation.
"""

import difflib
import re
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import ConfigDict, Field, field_validator, model_validator

from megatron_rl.config.alp_section import AlpConfig
from megatron_rl.config.block import Block, check_names
from megatron_rl.errors import did_you_mean, shorten
from megatron_rl.plugins import is_import_path

BUILT_IN_TASKS = ("arithmetic", "running_total", "math", "tool")
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
LOGGERS = ("tensorboard", "wandb")  # those of this package


class ModelConfig(Block):
    """The model to train."""

    path: Path = Field(description="Hugging Face folder: config.json, safetensors, tokenizer")
    reference: Path | None = Field(
        None,
        description="folder of the reference policy (the teacher of objective opd, the policy of kl_coef), of the same "
        "architecture and tokenizer; unset: the weights that the run starts from",
    )


class ParallelConfig(Block):
    """Sizes of the trainer's parallel layout."""

    tensor: int = Field(1, ge=1, description="number of ranks that share every matrix of a layer")
    pipeline: int = Field(1, ge=1, description="number of stages that the layers are divided into")
    virtual_pipeline: int = Field(1, ge=1, description="number of model chunks per pipeline stage")
    context: int = Field(1, ge=1, description="number of ranks that share the tokens of a sequence")
    expert: int = Field(1, ge=1, description="number of ranks that share the experts of a mixture-of-experts model")
    data: int = Field(1, ge=1, description="number of replicas; there are tensor x pipeline x context x data ranks")
    sequence: bool = Field(False, description="sequence parallelism inside the tensor-parallel group")
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="what backward recomputes; none: logits beyond 1 GiB (CPU: 256 MiB) of a micro-batch; selective: "
        "all logits, and attention from q, k, v to its output; full: all logits and whole layers",
    )

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.tensor * self.pipeline * self.context * self.data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence: true needs tensor > 1")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError("virtual_pipeline > 1 needs pipeline > 1")
        ranks = self.tensor * self.context * self.data
        if ranks % self.expert:
            raise ValueError(
                f"expert: {self.expert} must divide tensor x context x data = {ranks}, the ranks of one stage"
            )
        return self


class PrecisionConfig(Block):
    """Number formats of the trainer and of the engines."""

    train: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="dtype of the trainer's parameters and activations; master weights are fp32"
    )
    recipe: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4"] = Field(
        "none", description="quantization of the layers' matrix products in training, named as in megatron-core"
    )
    format: Literal["e4m3", "hybrid"] = Field("e4m3", description="FP8 format; hybrid: e5m2 for gradients")
    pow2_scales: bool = Field(
        False, description="blockwise: scales are powers of two (the default of Transformer Engine)"
    )
    first_last_bf16: bool = Field(
        False, description="do not quantize the first and the last layer, in trainer and engines"
    )
    attention: Literal["auto", "flash", "fused"] = Field(
        "auto",
        description="kernel of attention of Transformer Engine's layers: flash-attn, cuDNN's fused one, or its choice",
    )
    fp32_lm_head: bool = Field(
        False, description="compute log-probabilities from a float32 product with the output weights"
    )
    rollout: Literal["fp32", "bf16", "fp16", "fp8_blockwise", "fp8_blockwise_pow2", "int8", "mxfp8", "nvfp4"] = Field(
        "fp32",
        description="format of the engines' weights; engines with quantized weights compute in bf16; mxfp8, nvfp4: "
        "emulated",
    )
    rollout_activations: Literal["none", "fp8", "fp4"] = Field(
        "none",
        description="engines quantize the inputs of quantized layers, per token; fp8: in blocks of 1 x 128 (rollout: "
        "mxfp8: 1 x 32); fp4: in blocks of 1 x 16, for rollout: nvfp4",
    )


class SGLangConfig(Block):
    """How `sglang.launch_server` is started for rollout.engine: sglang."""

    python: Path = Field(
        Path(".venv-sglang/bin/python"), description="Python interpreter of the environment that has sglang"
    )
    tensor: int = Field(1, ge=1, description="tensor-parallel size of each server")
    first_gpu: int | None = Field(
        None,
        ge=0,
        description="index of the first GPU of the first server; unset: after those of the trainer's ranks on this "
        "machine, or 0 with rollout.colocate",
    )
    mem_fraction: float = Field(0.8, gt=0, lt=1, description="share of a GPU's memory for weights and cache")
    router: bool = Field(False, description="start sglang-router in front of the servers")
    args: tuple[str, ...] = Field((), description="additional arguments of sglang.launch_server, passed unchanged")


class RolloutConfig(Block):
    """Engines, sampling, and how weights reach the engines."""

    engine: Literal["embedded", "sglang"] = Field(
        "embedded", description="engine of the servers: the one of this package, or SGLang"
    )
    servers: int = Field(
        1,
        ge=1,
        le=256,
        description="number of servers to start; with urls_dir: to wait for at the start; ignored if urls is set",
    )
    urls: tuple[str, ...] = Field((), description="running servers to use instead; a run never stops them")
    urls_dir: Path | None = Field(
        None,
        description="folder of the ready files of servers to use instead (`serve --ready-file`); they may come and go",
    )
    api_key_file: Path | None = Field(
        None,
        description="file (mode 600) with the API key that the servers of urls or urls_dir want; unset: none",
    )
    prompts_per_step: int = Field(32, ge=1, le=1_000_000, description="number of prompts that a step trains on")
    samples_per_prompt: int = Field(
        8, ge=1, le=4096, description="number of responses to each prompt, which are one group"
    )
    max_prompt_tokens: int = Field(256, ge=1, description="maximum length of a prompt, in tokens")
    max_new_tokens: int = Field(64, ge=1, description="maximum length of a response, tool output included, in tokens")
    temperature: float = Field(
        1.0, ge=1e-6, le=1000, description="sampling temperature, in training and in sampled evaluations"
    )
    deterministic: bool = Field(False, description="same seed, same trajectories: every request is its own batch")
    record_logmu: bool = Field(
        False,
        description="request log-probabilities from the engines and log the mismatch, even if the objective needs none",
    )
    weights_dir: Path | None = Field(
        None,
        description="folder for weight versions; engines must be able to read it; unset: shared memory of this machine",
    )
    timeout_s: float = Field(
        600.0, gt=0, description="time limit of a generation request and of each call of a weight update, in seconds"
    )
    start_timeout_s: float = Field(
        300.0, gt=0, description="time limit for engines to become healthy at the start of a run, in seconds"
    )
    transport: Literal["disk", "distributed", "tensor"] = Field(
        "disk",
        description="how weights reach the engines: files in a folder, a broadcast, or shared memory on one machine",
    )
    bucket_mb: int = Field(
        256, ge=1, le=65536, description="size of one bucket of weights, in MiB; for transports distributed and tensor"
    )
    max_staleness: int = Field(
        0,
        ge=0,
        le=1000,
        description="maximum number of versions that sampling lags behind training; 0: strictly on-policy, no overlap",
    )
    update_mode: Literal["retract", "in_place", "abort"] = Field(
        "retract",
        description="running requests at a weight update; retract: recompute their cache; in_place: keep their cache; "
        "abort: end them and resume from the prefix",
    )
    oversample: float = Field(
        1.0, ge=1, le=100, description="groups requested per group trained on; the slowest are discarded"
    )
    max_resampled_groups: int = Field(
        0,
        ge=0,
        description="maximum number of groups that a step replaces because their rewards are all equal; 0: none",
    )
    routing_replay: bool = Field(
        False,
        description="mixture of experts: the trainer routes every token to the experts that the engine chose (R3)",
    )
    colocate: bool = Field(
        False,
        description="trainer and own servers use the same GPUs in turns: engines give their memory back while the "
        "trainer works, and the trainer moves its gradients and optimizer state to the host while engines generate",
    )
    sglang: SGLangConfig = SGLangConfig()

    @property
    def own_servers(self) -> bool:
        """Whether the run starts its own servers."""
        return not self.urls and self.urls_dir is None


class OptimizerConfig(Block):
    """The optimizer and the micro-batches of an update."""

    lr: float = Field(1.0e-6, gt=0, description="learning rate of Adam")
    updates_per_step: int = Field(4, ge=1, description="number of optimizer updates made from the batch of a step")
    tokens_per_microbatch: int = Field(4096, ge=1, description="maximum number of tokens in one packed micro-batch")
    grad_clip: float = Field(1.0, ge=0, description="maximum gradient norm; 0: no clipping")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay (AdamW)")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1.0e-8, gt=0, le=1, description="term added to the root of the second moment")
    warmup_updates: int = Field(0, ge=0, description="number of updates of linear learning-rate warm-up")
    distributed: bool = Field(False, description="shard the optimizer state over data-parallel ranks")


class ObjectiveConfig(Block):
    """The objective: its name, how advantages are computed from rewards, and the keys of that objective.

    `objectives.make_objective` checks these keys.
    """

    model_config = ConfigDict(extra="allow")

    name: str = Field("drpo", description="name of an objective, erpd, or your own: file.py:Class, package.mod:Class")
    advantage: Literal["mean", "grpo", "rloo", "dr_grpo", "whiten"] = Field(
        "mean", description="how the rewards of a group become advantages; see docs/objectives.md"
    )
    overlong_buffer: int = Field(
        0,
        ge=0,
        description="tokens before rollout.max_new_tokens over which the reward falls by up to 1; 0: no penalty",
    )

    @model_validator(mode="before")
    @classmethod
    def _exponents_are_numbers(cls, data: Any) -> Any:
        """Read 1e-3 as a number in the keys of the objective; to YAML 1.1 it is text without a point."""
        return _with_numbers(data)

    def spec(self) -> dict[str, Any]:
        """Return the argument of `make_objective`: the name and the keys of that objective."""
        return {"name": self.name, **(self.model_extra or {})}


def _with_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_numbers(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_numbers(one) for one in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


class TaskConfig(Block):
    """The task: its data, its reward, and the limits of its tool."""

    name: str = Field(
        "arithmetic",
        description="arithmetic, running_total, math, tool, or your own: file.py:Class, package.mod:Class",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="keys of your own task")
    reward: str | None = Field(
        None,
        description="replaces the task's verifier: file.py:function, package.mod:function, or the URL of a server",
    )
    reward_timeout_s: float = Field(
        30.0, gt=0, allow_inf_nan=False, description="time limit of one call of your own reward, in seconds"
    )
    reward_on_error: Literal["raise", "zero"] = Field(
        "raise",
        description="your own reward raises, takes too long or returns no number; raise: the run ends; zero: it is 0",
    )
    data: Path | None = Field(None, description="JSONL or Parquet file with prompts and answers (math, tool)")
    eval_data: Path | None = Field(None, description="held-out file; unset: the last rows of data are held out")
    prompt_column: str = Field("question", description="text or chat messages; a.b is key b of column a")
    answer_column: str = Field("answer", description="ground truth; may be absent if reward is set; a.b as above")
    max_operand: int = Field(
        20, ge=2, description="arithmetic, and tool without data: operands are in [0, max_operand)"
    )
    terms: int = Field(
        26, ge=8, le=4096, description="running_total: digits in a problem; an answer has two for each but the first"
    )
    problems: int = Field(
        4096, ge=1, le=10**6, description="running_total: number of generated problems, held_out among them"
    )
    held_out: int = Field(64, ge=0, description="number of problems held out of training, for evaluation")
    split_seed: int | None = Field(
        None,
        ge=-(2**62),
        le=2**62,
        description="seed of the shuffle that holds generated problems out of training; unset: run.seed. Set it where "
        "runs of several seeds are compared: they then have the same held-out problems",
    )
    max_turns: int = Field(3, ge=1, description="tool: maximum number of model turns in one response")
    sandbox: Literal["jail", "unsafe"] = Field("jail", description="tool; unsafe: run the model's code without a jail")
    tool_seconds: float = Field(5.0, gt=0, description="tool: wall-clock limit of one block of code, in seconds")
    tool_memory_mb: int = Field(256, ge=16, description="tool: memory limit of one block of code, in MiB")
    tool_tokens: int = Field(
        256, ge=1, description="tool: maximum length of an output returned to the model, in tokens"
    )

    @field_validator("name")
    @classmethod
    def _names_a_task(cls, value: str) -> str:
        if value not in BUILT_IN_TASKS and not is_import_path(value):
            raise ValueError(
                f"it is '{shorten(value)}'; {did_you_mean(value, BUILT_IN_TASKS)}, or your own: file.py:Class"
            )
        return value

    @field_validator("reward")
    @classmethod
    def _names_a_reward(cls, value: str | None) -> str | None:
        if value is not None and not is_import_path(value) and not value.startswith(("http://", "https://")):
            raise ValueError(
                f"it is '{shorten(value)}'; give file.py:function, package.module:function or http://host:port/path"
            )
        return value


class EvalConfig(Block):
    """Evaluation on held-out problems."""

    every: int = Field(0, ge=0, description="steps between evaluations; 0: only before and after the run")
    prompts: int = Field(0, ge=0, description="number of held-out problems per evaluation; 0: no evaluation")
    samples: int = Field(4, ge=1, le=4096, description="samples per problem for the sampled pass rate")


class RunConfig(Block):
    """The run: its folder, length, seed, checkpoints and device."""

    name: str = Field("run", min_length=1, description="name of the run folder, inside dir; a/b is b in folder a")
    dir: Path = Field(Path("runs"), description="folder that holds the run folder")
    steps: int = Field(60, ge=0, description="number of steps of the run")
    seed: int = Field(0, ge=-(2**62), le=2**62, description="seed of prompts, sampling and noise")
    save_every: int = Field(20, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(2, ge=1, description="number of checkpoints to keep")
    deadline_margin_s: float = Field(
        60.0,
        ge=0,
        description="time that must be left, after the next step and its checkpoint, before the deadline that a "
        "launcher wrote; in seconds",
    )
    attribute_every: int = Field(
        0,
        ge=0,
        description="steps between attributions of the mismatch to its sources, each of some forward passes; 0: never",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="device of the trainer and its own servers; auto: cuda if there is one"
    )
    show_samples: int = Field(
        0, ge=0, description="number of prompts per step whose responses are written to samples.jsonl as text; 0: none"
    )
    loggers: tuple[str, ...] = Field(
        ("tensorboard",),
        description="where records go in addition to log.jsonl: tensorboard, wandb, or a class of your own as "
        "file.py:Name or package.module:Name",
    )

    @field_validator("name")
    @classmethod
    def _lies_inside_dir(cls, value: str) -> str:
        check_names(value)
        parts = value.split("/")
        if value.startswith("/") or ".." in parts or all(part in ("", ".") for part in parts):
            raise ValueError(
                f"it is '{shorten(value)}'; it names a folder inside run.dir: set run.dir for another place"
            )
        return value

    @field_validator("loggers")
    @classmethod
    def _known_loggers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for at, name in enumerate(value):
            if name not in LOGGERS and not is_import_path(name):
                near = difflib.get_close_matches(name[:100], LOGGERS, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"there is no logger '{shorten(name)}'; did you mean '{near}'? Your own is file.py:Name"
                )
            if name in value[:at]:
                raise ValueError(f"'{name}' is given twice")
        return value

    @property
    def folder(self) -> Path:
        """The run folder, `dir/name`."""
        return self.dir / self.name


class Config(Block):
    """The whole configuration: one field per section."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    alp: AlpConfig = AlpConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    task: TaskConfig = TaskConfig()
    eval: EvalConfig = EvalConfig()
    run: RunConfig = RunConfig()

    def dump(self) -> str:
        """Return the resolved configuration as YAML. Loading it again returns an equal Config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
