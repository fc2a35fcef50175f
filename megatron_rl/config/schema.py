"""The keys of the configuration: a class is a section, a field is a key. Frozen, validated once, before any allocation."""

import math
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from megatron_rl.config import rules


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ModelConfig(_Block):
    path: Path = Field(description="Hugging Face folder: config.json, safetensors, tokenizer")


class ParallelConfig(_Block):
    tensor: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    virtual_pipeline: int = Field(1, ge=1, description="model chunks per pipeline stage")
    context: int = Field(1, ge=1)
    expert: int = Field(1, ge=1, description="ranks over which the experts of a mixture-of-experts model are spread")
    data: int = Field(1, ge=1, description="replicas; tensor x pipeline x context x data is the number of ranks")
    sequence: bool = Field(False, description="sequence parallelism inside the tensor-parallel group")
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="what backward computes again: selective: attention between q, k, v and its output; full: layers",
    )

    @property
    def world_size(self) -> int:
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


class PrecisionConfig(_Block):
    train: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="parameters and activations of the trainer; fp32 masters"
    )
    recipe: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4"] = Field(
        "none", description="how the layers' matrix products are quantized in training, named as in megatron-core"
    )
    format: Literal["e4m3", "hybrid"] = Field("e4m3", description="of FP8 gradients: hybrid takes e5m2 for them")
    pow2_scales: bool = Field(
        False, description="blockwise: scales are powers of two (Transformer Engine's own default)"
    )
    first_last_bf16: bool = Field(False, description="the first and the last layer are not quantized, on neither side")
    fp32_lm_head: bool = Field(False, description="log-probabilities from a float32 product with the output weights")
    rollout: Literal["fp32", "bf16", "fp16", "fp8_blockwise", "fp8_blockwise_pow2", "int8"] = Field(
        "fp32", description="weights of the engines; the quantized ones compute in bf16"
    )
    rollout_activations: Literal["none", "fp8"] = Field(
        "none", description="fp8: engines quantize the inputs of quantized layers, 1 x 128 per token"
    )


class SGLangConfig(_Block):
    """How `sglang.launch_server` is started for rollout.engine: sglang."""

    python: Path = Field(
        Path(".venv-sglang/bin/python"), description="interpreter of the environment that holds sglang"
    )
    tensor: int = Field(1, ge=1, description="tensor-parallel size of each server")
    first_gpu: int = Field(0, ge=0, description="GPU of this machine that the first server begins on")
    mem_fraction: float = Field(0.8, gt=0, lt=1, description="of a GPU's memory, for weights and cache")
    router: bool = Field(False, description="sglang-router in front of the servers")
    args: tuple[str, ...] = Field((), description="further arguments of sglang.launch_server, as they are")


class RolloutConfig(_Block):
    engine: Literal["embedded", "sglang"] = "embedded"
    servers: int = Field(1, ge=1, description="servers to start; ignored when urls are given")
    urls: tuple[str, ...] = Field((), description="running servers to use instead; never stopped by us")
    prompts_per_step: int = Field(32, ge=1)
    samples_per_prompt: int = Field(8, ge=1)
    max_prompt_tokens: int = Field(256, ge=1)
    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(1.0, gt=0)
    deterministic: bool = Field(False, description="same seed, same trajectories: every request is its own batch")
    record_logmu: bool = Field(
        False, description="ask for behavior log-probs, and log the mismatch, also when the objective does without them"
    )
    weights_dir: Path | None = Field(
        None,
        description="where weight versions are staged; engines must be able to read it; default: shared memory here",
    )
    timeout_s: float = Field(600.0, gt=0, description="per generation request")
    transport: Literal["disk", "distributed", "tensor"] = Field(
        "disk", description="how weights reach the engines: a folder, a broadcast, or memory shared on one machine"
    )
    bucket_mb: int = Field(256, ge=1, description="MiB of weights sent at once by distributed and tensor")
    max_staleness: int = Field(
        0, ge=0, description="versions that sampling may lag behind training; 0: strictly on-policy, nothing overlaps"
    )
    update_mode: Literal["retract", "in_place", "abort"] = Field(
        "retract",
        description="running requests at a weight update: cache computed again, cache kept, or ended and resumed by prefix",
    )
    oversample: float = Field(1.0, ge=1, description="groups asked for per group trained on; the slowest are given up")
    max_resampled_groups: int = Field(
        0,
        ge=0,
        description="groups a step may draw in place of those whose rewards are all equal; 0: none are replaced",
    )
    routing_replay: bool = Field(
        False, description="mixture of experts: the trainer routes every token to the experts the engine chose (R3)"
    )
    sglang: SGLangConfig = SGLangConfig()

    @model_validator(mode="after")
    def _engine_keeps_its_word(self) -> Self:
        if self.sglang.router and self.engine != "sglang":
            raise ValueError(
                "sglang.router: true needs engine: sglang; requests to embedded servers are spread by the trainer"
            )
        if self.sglang.router and self.urls:
            raise ValueError(
                "sglang.router: true starts a router for servers of our own, and urls names others: leave out one"
            )
        if self.sglang.router and self.routing_replay:
            raise ValueError(
                "routing_replay: true does not go with sglang.router: the router drops the request for experts"
            )
        if self.engine != "sglang" and self.sglang.model_copy(update={"router": False}) != SGLangConfig():
            raise ValueError(
                "sglang.* is about servers of engine: sglang, and engine is embedded: leave it out, or change engine"
            )
        if self.deterministic and self.engine == "sglang":
            raise ValueError(
                "deterministic: true is a promise of engine: embedded; SGLang's samples depend on their batch"
            )
        return self


class OptimizerConfig(_Block):
    lr: float = Field(1.0e-6, gt=0)
    updates_per_step: int = Field(4, ge=1)
    tokens_per_microbatch: int = Field(4096, ge=1, description="packed token budget of one micro-batch")
    grad_clip: float = Field(1.0, ge=0, description="0 turns clipping off")
    weight_decay: float = Field(0.01, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1.0e-8, gt=0)
    warmup_updates: int = Field(0, ge=0, description="linear warm-up of the learning rate")
    distributed: bool = Field(False, description="shard optimizer state over data-parallel ranks")


class ObjectiveConfig(BaseModel):
    """`name`, what makes advantages of rewards, and the keys of that objective; checked by `objectives.make_objective`."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = "drpo"
    advantage: Literal["mean", "grpo", "rloo", "dr_grpo", "whiten"] = "mean"
    overlong_buffer: int = Field(
        0,
        ge=0,
        description="tokens before rollout.max_new_tokens over which the reward falls by up to 1; 0: it does not",
    )

    def spec(self) -> dict[str, Any]:
        """What `make_objective` takes: the name and its keys."""
        return {"name": self.name, **(self.model_extra or {})}


class AlpConfig(_Block):
    """Adaptive layerwise perturbation (arXiv 2603.19470): learnable noise at the input of every layer in updates."""

    enabled: bool = False
    sigma_init: float = Field(1.0e-4, description="standard deviation of the noise that every layer starts from")
    learnable: bool = Field(True, description="false: every layer keeps sigma_init")
    lr: float = Field(5.0e-4, gt=0, description="of log sigma; warmed up like optimizer.lr")
    weight_decay: float = Field(
        0.0, ge=0, description="of log sigma, which it pulls towards 0, that is sigma upwards; 0.01 in the paper's runs"
    )
    layers: Literal["all", "logits"] | tuple[int, int] = Field(
        "all", description="all, or [start, end) of the layers, from 0; logits: of no layer, the logits instead"
    )
    level: Literal["token", "sequence", "cumulative", "geometric"] | None = Field(
        None, description="what one ratio spans; unset: what the objective says"
    )

    @field_validator("sigma_init")
    @classmethod
    def _positive(cls, value: float) -> float:
        if not 0 < value < math.inf:
            raise ValueError(
                f"it is {value}; it must be above 0, since its logarithm is learnt (no noise: enabled: false)"
            )
        return value

    @field_validator("layers")
    @classmethod
    def _range(cls, value: Any) -> Any:
        if isinstance(value, tuple) and not 0 <= value[0] < value[1]:
            raise ValueError(f"it is {list(value)}; a range is [start, end) with 0 <= start < end")
        return value


class TaskConfig(_Block):
    name: Literal["arithmetic", "math", "tool"] = "arithmetic"
    data: Path | None = Field(None, description="JSONL or parquet with prompts and answers (math, tool)")
    eval_data: Path | None = Field(None, description="held-out file; without it the last rows of data are held out")
    prompt_column: str = "question"
    answer_column: str = "answer"
    max_operand: int = Field(20, ge=2, description="arithmetic, tool without data: operands lie in [0, max_operand)")
    held_out: int = Field(64, ge=0, description="problems kept out of training for evaluation")
    max_turns: int = Field(3, ge=1, description="tool: turns of the model in one response")
    sandbox: Literal["jail", "unsafe"] = Field("jail", description="tool: unsafe runs the model's code without a jail")
    tool_seconds: float = Field(5.0, gt=0, description="tool: wall clock of one block of code")
    tool_memory_mb: int = Field(256, ge=16, description="tool: memory of one block of code")
    tool_tokens: int = Field(256, ge=1, description="tool: longest output given back to the model")


class EvalConfig(_Block):
    every: int = Field(0, ge=0, description="steps between evaluations; 0: only before and after the run")
    prompts: int = Field(0, ge=0, description="held-out problems per evaluation; 0: no evaluation")
    samples: int = Field(4, ge=1, description="samples per problem for the sampled pass rate")


class RunConfig(_Block):
    name: str = "run"
    dir: Path = Path("runs")
    steps: int = Field(60, ge=0)
    seed: int = 0
    save_every: int = Field(20, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(2, ge=1, description="checkpoints kept")
    attribute_every: int = Field(
        0,
        ge=0,
        description="steps between attributions of the mismatch to its sources, each some forward passes; 0: never",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @property
    def folder(self) -> Path:
        return self.dir / self.name


class Config(_Block):
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

    @model_validator(mode="after")
    def _budgets(self) -> Self:
        longest = self.rollout.max_prompt_tokens + self.rollout.max_new_tokens
        align = 2 * self.parallel.context if self.parallel.context > 1 else 1
        if -(-longest // align) * align > self.optimizer.tokens_per_microbatch:
            raise ValueError(
                f"optimizer.tokens_per_microbatch is {self.optimizer.tokens_per_microbatch}, but one trajectory may have "
                f"rollout.max_prompt_tokens + rollout.max_new_tokens = {longest} tokens: raise the former or lower the latter"
            )
        unit = 2 * self.parallel.context * self.parallel.tensor
        if self.optimizer.tokens_per_microbatch % unit:
            raise ValueError(f"optimizer.tokens_per_microbatch must be a multiple of 2 x context x tensor = {unit}")
        if self.optimizer.updates_per_step > self.rollout.prompts_per_step:
            raise ValueError(
                "optimizer.updates_per_step exceeds rollout.prompts_per_step: an update needs at least one prompt"
            )
        if self.objective.overlong_buffer > self.rollout.max_new_tokens:
            raise ValueError(
                "objective.overlong_buffer exceeds rollout.max_new_tokens: it is a part of the longest response"
            )
        if self.task.name == "math" and self.task.data is None:
            raise ValueError("task.data is required for task.name: math")
        if self.task.name == "tool":
            self._tool_fits()
        for check in rules.ROLLOUT_RULES:
            check(self)
        return self

    def _tool_fits(self) -> None:
        if self.task.max_turns < 2:
            raise ValueError("task.max_turns is 1, but task.name: tool needs a second turn, in which an output is read")
        if self.task.tool_tokens >= self.rollout.max_new_tokens:
            raise ValueError(
                f"task.tool_tokens is {self.task.tool_tokens}, but rollout.max_new_tokens, which a response has for all its "
                f"turns and outputs, is {self.rollout.max_new_tokens}: lower the former or raise the latter"
            )

    def dump(self) -> str:
        """The resolved configuration as YAML; loading it again gives an equal Config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
