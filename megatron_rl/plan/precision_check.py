"""The precision plan of a configuration, checked against its model's shapes and a machine."""

from collections.abc import Iterator
from dataclasses import replace
from math import gcd

from megatron_rl.config import Config
from megatron_rl.errors import ConfigError, PrecisionError
from megatron_rl.precision.machine import Machine, execution_mode, uses_transformer_engine
from megatron_rl.precision.plan import DTYPES, PrecisionPlan, resolve
from megatron_rl.precision.plan_checks import BLOCK, EngineCut, Matrix, PlanReport, RowRange, check_plan
from megatron_rl.weights.families import Family, ModelShape
from megatron_rl.weights.layouts import QKV, GateUp, Layout
from megatron_rl.weights.name_table import Entry, entries


def check_precision(config: Config, family: Family, shape: ModelShape, machine: Machine) -> PlanReport:
    """Resolve the precision plan and check it against the model's shapes and the machine.

    Args:
        config: the resolved configuration.
        family: model family, which names the parameters.
        shape: sizes of the model.
        machine: machine to check for.

    Raises:
        ConfigError: if keys contradict each other.
        PrecisionError: if the machine or the shapes do not support the plan.
    """
    plan = resolve(config.precision, shape.num_layers, engine=config.rollout.engine, device=machine.device)
    _check_block_codes(plan, config, machine)
    computed = execution_mode(plan.recipe, machine, pow2=config.precision.pow2_scales) if plan.trains_low else ""
    table = entries(family, shape)
    units = [count for entry in table if entry.expert is None for count in entry.rule.layout.units.values()]
    common = gcd(*units)
    sizes = [size for size in range(1, common + 1) if common % size == 0 and _fits(table, size)]
    report = check_plan(
        plan,
        {size: tuple(matrices(plan, table, size)) for size in sizes},
        tensor=config.parallel.tensor,
        tokens=_tokens_per_rank(config),
        num_layers=shape.num_layers,
        computed=computed,
        engine=config.rollout.engine,
        foreign=not config.rollout.own_servers,
        engine_cut=EngineCut(config.rollout.sglang.tensor, shape.num_kv_heads),
    )
    _check_layers(config, machine)
    return replace(report, warnings=(*report.warnings, *_gather_warnings(config, report)))


def _check_layers(config: Config, machine: Machine) -> None:
    """Raise ConfigError or PrecisionError if a key is about Transformer Engine's layers, and the trainer has others."""
    p = config.precision
    if machine.capability is not None and p.recipe != "none" and p.train == "fp32":
        raise PrecisionError(
            f"precision.recipe {p.recipe} on a GPU needs precision.train: bf16: in fp32 Transformer Engine's attention "
            "would store all scores, and its products outside the recipe would be TF32"
        )
    if p.attention != "auto" and not uses_transformer_engine(DTYPES[p.train], machine):
        raise ConfigError(
            f"precision.attention: {p.attention} is a kernel of Transformer Engine's layers, and this trainer has "
            "megatron-core's local ones (it has no GPU, no transformer-engine, or precision.train: fp32): leave it at "
            "auto"
        )


def _gather_warnings(config: Config, report: PlanReport) -> list[str]:
    """Warn if Transformer Engine gathers the inputs of block-scaled products in bf16 instead of in FP8."""
    tokens = _tokens_per_rank(config)
    if report.computed != "native" or report.plan.recipe != "blockwise" or not config.parallel.sequence:
        return []
    if tokens % BLOCK == 0:
        return []
    return [
        f"a rank has {tokens} tokens of a sequence-parallel stream, not a multiple of {BLOCK}: Transformer Engine "
        "gathers them in bf16, which is slower; change optimizer.tokens_per_microbatch"
    ]


def _check_block_codes(plan: PrecisionPlan, config: Config, machine: Machine) -> None:
    """Raise PrecisionError if SGLang would replace the trainer's codes: on sm_100 it makes power-of-two scales itself.

    The packed scales also do not fit the next weight update.
    """
    if (machine.capability or (0, 0)) < (10, 0) or config.rollout.engine != "sglang" or plan.dequantized:
        return
    if plan.rolls_out_low:
        raise PrecisionError(
            f"precision.rollout: {config.precision.rollout} on {machine.name}: SGLang 0.5.23 quantizes block-FP8 "
            "weights again there, so it would not multiply the trainer's codes, and the second weight update does "
            "not fit: take rollout: bf16, or engines on sm_90"
        )


def _fits(table: tuple[Entry, ...], size: int) -> bool:
    """Return whether `size` tensor-parallel ranks can hold the model."""
    try:
        for entry in table:
            entry.rule.layout.check(entry.cut(size))
    except ConfigError:
        return False
    return True


def _tokens_per_rank(config: Config) -> int:
    cut = config.parallel.tensor if config.parallel.sequence else 1
    return config.optimizer.tokens_per_microbatch // config.parallel.context // cut


def matrices(plan: PrecisionPlan, table: tuple[Entry, ...], size: int) -> Iterator[Matrix]:
    """Yield every matrix that the plan quantizes anywhere, with its shapes and rows on the ranks.

    Args:
        plan: the resolved precision plan.
        table: name table of the model's parameters.
        size: number of tensor-parallel ranks.
    """
    for entry in table:
        layout = entry.rule.layout
        parts = [part for part in enumerate(entry.rule.hf) if plan.quantized(part[1])]
        cut = entry.cut(size)
        runs = _runs(layout, cut) if parts else []
        local_rows, local_columns = layout.local_shape(cut) if parts else (0, 0)
        for part, name in parts:
            rows, columns = layout.shapes[part]
            yield Matrix(name, rows, columns, entry.mcore, local_rows, local_columns, tuple(runs[part]))


def _runs(layout: Layout, size: int) -> list[list[RowRange]]:
    """Return, per Hugging Face matrix of a parameter, its rows on each of `size` ranks, as in `Layout.read`."""
    if isinstance(layout, QKV):
        found: list[list[RowRange]] = [[], [], []]
        held = layout.local_shape(size)[0]
        for rank in range(size):
            at = 0
            for part, start, stop in layout.slices(rank * held, held):
                found[part].append(RowRange(start, at, stop - start))
                at += stop - start
        return found
    if isinstance(layout, GateUp):
        rows = layout.ffn_hidden_size // size
        return [[RowRange(rank * rows, part * rows, rows) for rank in range(size)] for part in range(2)]
    rows = layout.local_shape(size)[0]
    cut = layout.shapes[0][0] // rows
    return [[RowRange(rank * rows, 0, rows) for rank in range(cut)]]
