"""The plan of a run: everything that follows from configuration, model and machine. It is resolved once."""

import math
import os
from dataclasses import dataclass

from rich.console import Console

from megatron_rl.alp.layer_noise import LayerNoise, layer_noise
from megatron_rl.attribution.limits import check_replayable
from megatron_rl.config import Config
from megatron_rl.engines.processes.own_servers import own_servers
from megatron_rl.errors import ConfigError
from megatron_rl.plan.algorithm_plan import AlgorithmPlan, plan_algorithm
from megatron_rl.plan.engine_check import check_engine
from megatron_rl.plan.placement import Placement, place, ranks_here
from megatron_rl.plan.precision_check import check_precision
from megatron_rl.plan.reference_check import check_reference
from megatron_rl.policy.expert_rules import check_experts
from megatron_rl.policy.shape_rules import check_shape
from megatron_rl.precision.machine import Machine, this_machine, uses_transformer_engine
from megatron_rl.precision.plan import DTYPES, PrecisionPlan
from megatron_rl.precision.plan_checks import PlanReport
from megatron_rl.precision.table import describe
from megatron_rl.weights.families import ModelShape
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.hf_model import check_folder

_FARTHEST = 1e6  # larger factors are not told apart


@dataclass(frozen=True)
class RunPlan:
    """What a run does, in the terms of its parts.

    Attributes:
        machine: the machine that it was resolved for.
        shape: sizes of the model.
        report: the precision plan, with what was checked about it.
        algorithm: the training method and its objective.
        noise: ALP's noise in the trainer's updates; None without ALP.
        need_logmu: engines report the log-probabilities of the tokens they sample.
        placement: the GPUs of ranks and engines.
    """

    machine: Machine
    shape: ModelShape
    report: PlanReport
    algorithm: AlgorithmPlan
    noise: LayerNoise | None
    need_logmu: bool
    placement: Placement

    @property
    def precision(self) -> PrecisionPlan:
        """The number formats of trainer and engines."""
        return self.report.plan

    def lines(self, config: Config) -> list[str]:
        """Return the objective, what engines report, and the placement of trainer and engines, as text."""
        rollout, parallel = config.rollout, config.parallel
        columns = ["tokens", "versions", *["logmu"] * self.need_logmu]
        columns += [f"top {self.algorithm.topk} tokens"] if self.algorithm.topk else []
        columns += ["routed experts"] if rollout.routing_replay else []
        sizes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context}
        sizes |= {"expert": parallel.expert, "data": parallel.data}
        layout = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        ranks = f"{parallel.world_size} ranks ({layout})" if layout else "1 rank"
        engines = f"{len(rollout.urls)} given" if rollout.urls else f"{rollout.servers} of its own"
        engines = engines if rollout.urls_dir is None else f"those of {rollout.urls_dir}"
        te = uses_transformer_engine(DTYPES[config.precision.train], self.machine)
        layers = f"Transformer Engine's (attention: {config.precision.attention})" if te else "megatron-core's local"
        noise = "" if self.noise is None else f", perturbed by ALP from sigma {self.noise.sigma_init:g}"
        noise += self._reach_of_sigma(config)
        return [
            f"objective: {config.objective.name}{noise}; engines report {', '.join(columns)}",
            f"placement: {ranks} on {self.machine.name}, {rollout.engine} engines: {engines}"
            + (f"; {self.placement}" if str(self.placement) else ""),
            f"layers: {layers}",
            *([] if config.model.reference is None else [f"reference policy: {config.model.reference}"]),
            *_recompute_remark(config, te),
        ]

    def _reach_of_sigma(self, config: Config) -> str:
        """Return how far sigma can move in the run: Adam moves log sigma by at most about its rate an update."""
        if self.noise is None or not self.noise.learnable or self.algorithm.erpd is not None:
            return ""
        updates = config.run.steps * config.optimizer.updates_per_step
        factor = math.exp(min(config.alp.lr * updates, math.log(_FARTHEST)))
        times = f"more than {_FARTHEST:.0e}" if factor >= 0.999 * _FARTHEST else f"about {factor:.3g}"
        return f" ({updates} updates at alp.lr {config.alp.lr:g} move it at most by a factor of {times})"


def resolve_run(config: Config, *, trains: bool = True) -> RunPlan:
    """Return the plan of a configuration. Starts nothing and writes nothing.

    Raises ConfigError, CheckpointError or PrecisionError if the model or this machine cannot do what is asked for.
    Unless `trains`, no rank of a trainer uses a GPU.
    """
    algorithm, machine = plan_algorithm(config), this_machine()
    placement = place(config, machine, ranks_here(config, machine, os.environ) if trains else 0)
    parallel = config.parallel
    sizes = {"tensor_parallel": parallel.tensor, "expert_parallel": parallel.expert}
    model = check_folder(HFFolder(config.model.path), **sizes)
    shape = model.shape
    check_reference(config, model)
    check_experts(config, shape)
    check_shape(config, shape)
    _check_sizes(config, shape)
    check_engine(config, model.family, shape)
    noise = layer_noise(config.alp, shape.num_layers)
    report = check_precision(config, model.family, shape, machine)
    if config.rollout.own_servers:
        own_servers(config, report.plan, machine.device, 0.0, offloads=algorithm.offloads_engines).check()
        check_transport(config, machine.device)
    if config.run.attribute_every:
        check_replayable(report.plan, machine)
    need_logmu = "logmu" in algorithm.objective.needs or config.rollout.record_logmu
    return RunPlan(machine, shape, report, algorithm, noise, need_logmu, placement)


def _recompute_remark(config: Config, te: bool) -> list[str]:
    if not te or config.parallel.recompute != "selective":
        return []
    return [
        "warning: parallel.recompute: selective computes attention twice and saves only the kept logits (at most 1 GiB "
        "a micro-batch), because Transformer Engine's kernels do not store the scores: take none or full"
    ]


def _check_sizes(config: Config, shape: ModelShape) -> None:
    """Raise ConfigError if the layers do not divide over the stages, or a trajectory exceeds the model's positions."""
    stages = config.parallel.pipeline * config.parallel.virtual_pipeline
    if shape.num_layers % stages:
        raise ConfigError(
            f"parallel.pipeline x parallel.virtual_pipeline = {stages} does not divide {shape.num_layers} layers"
        )
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    if longest > shape.max_position_embeddings:
        raise ConfigError(
            f"rollout.max_prompt_tokens + rollout.max_new_tokens = {longest} exceeds the model's "
            f"max_position_embeddings = {shape.max_position_embeddings}"
        )


def check_transport(config: Config, device: str) -> None:
    """Raise ConfigError if the transport cannot connect a trainer on `device` with this run's own servers."""
    rollout = config.rollout
    if device != "cpu" and rollout.engine == "embedded" and rollout.transport != "disk":
        raise ConfigError(
            f"rollout.transport: {rollout.transport} sends from the trainer's GPU, and embedded servers are on the "
            "CPU: take transport: disk, or engine: sglang"
        )


def print_plan(plan: RunPlan, config: Config, console: Console | None = None) -> None:
    """Print the plan to standard output."""
    console = console or Console(highlight=False)
    console.print(describe(plan.report))
    for line in plan.lines(config):
        console.print(line, soft_wrap=True)
