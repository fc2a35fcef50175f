"""The precision plan as a table, short enough to be printed at the start of every run."""

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megatron_rl.precision.plan import PrecisionPlan
from megatron_rl.precision.plan_checks import PlanReport


def describe(report: PlanReport) -> RenderableType:
    """Return the text that `train` and `doctor --config` print.

    It is one line if nothing is quantized, else a table with its explanation.
    """
    plan = report.plan
    warnings = [Text(f"warning: {warning}") for warning in report.warnings]
    if report.apart is None:
        return Group(Text(f"precision: {plan.train} in the trainer, {plan.engine} in the engines"), *warnings)
    verdict = "unified: no, because" if report.apart else "unified: yes, engines multiply the trainer's own codes"
    reasons = [Padding(f"- {reason}", (0, 0, 0, 2)) for reason in report.apart]
    return Group(_table(report), *_emulation(plan), Text(verdict), *reasons, *warnings)


def _emulation(plan: PrecisionPlan) -> list[Text]:
    if not plan.dequantized:
        return []
    told = f"it is sent the values of {plan.wire}, dequantized, and multiplies in {plan.engine}"
    return [Text(f"SGLang on CPU takes no codes: {told}")]


def _table(report: PlanReport) -> Table:
    plan = report.plan
    how = f"recipe {plan.recipe}, {report.computed}" if plan.trains_low else "no recipe"
    table = Table(
        title=f"precision: trainer {plan.train}, {how}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("matrices of")
    table.add_column(_quantized_layers(plan, report.num_layers))
    if plan.kept:
        table.add_column(f"layers {', '.join(map(str, sorted(plan.kept)))}")
    table.add_column("all else")
    trainer, engine = plan.train, plan.engine
    for name, low, high in (
        ("trainer: inputs", plan.inputs, trainer),
        ("trainer: weights", plan.weights, trainer),
        ("trainer: gradients", plan.gradients, trainer),
        ("wire", f"{plan.wire} as {engine}" if plan.dequantized else plan.wire, engine),
        ("engine: weights", f"{plan.engine_weights} as {engine}" if plan.dequantized else plan.engine_weights, engine),
        ("engine: inputs", plan.engine_inputs, engine),
    ):
        table.add_row(name, low, *([high] if plan.kept else []), high)
    table.add_row("engine: KV cache", plan.kv_cache, *([plan.kv_cache] if plan.kept else []), "-")
    return table


def _quantized_layers(plan: PrecisionPlan, num_layers: int) -> str:
    """Return the heading for the quantized layers. They are consecutive: only the first and the last layer are kept."""
    left = [layer for layer in range(num_layers) if layer not in plan.kept]
    return f"layer {left[0]}" if len(left) == 1 else f"layers {left[0]}-{left[-1]}"
