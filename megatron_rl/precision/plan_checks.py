"""Checks of a precision plan against the shapes of a model.

A plan that cannot work raises an error. A plan under which trainer and engines cannot match is reported.

A 128 x 128 block of an engine's weight is also a block of the trainer's weight only if both lie on the same grid. This
depends on the tensor-parallel cut and on the fused parameters (linear_qkv: q, k, v rows group by group; linear_fc1:
gate, then up).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_rl.errors import PrecisionError
from megatron_rl.precision.plan import PrecisionPlan

BLOCK = 128
# The dimensions of one rank's operands must be multiples of these numbers on tensor cores (nvfp4: 16 bytes of 4-bit
# codes). _ALIGN_TOKENS holds the values of megatron-core's get_fp8_align_size and get_fp4_align_size.
_ALIGN_TOKENS = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32, "nvfp4": 128}
_ALIGN = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32, "nvfp4": 32}


@dataclass(frozen=True)
class RowRange:
    """Consecutive rows of a matrix that are also consecutive in a rank's parameter.

    Attributes:
        start: first row in the matrix.
        at: first row in the rank's parameter.
        rows: number of rows.
    """

    start: int
    at: int
    rows: int


@dataclass(frozen=True)
class Matrix:
    """A Hugging Face matrix and the trainer's parameter that holds it, at one tensor-parallel size.

    Attributes:
        name: Hugging Face name.
        rows: rows of the matrix.
        columns: columns of the matrix.
        parameter: megatron-core's name of the parameter.
        local_rows: rows of the parameter on one rank, including those of other matrices fused into it.
        local_columns: columns of the parameter on one rank.
        runs: where the rows of the matrix lie, over all ranks.
    """

    name: str
    rows: int
    columns: int
    parameter: str
    local_rows: int
    local_columns: int
    runs: tuple[RowRange, ...]


@dataclass(frozen=True)
class EngineCut:
    """How an SGLang server divides matrices over its ranks.

    Attributes:
        tensor: tensor-parallel size of a server.
        kv_heads: heads of keys and values. A rank holds a whole one also if there are more ranks than heads.
    """

    tensor: int = 1
    kv_heads: int = 1

    def part(self, m: Matrix) -> tuple[int, int]:
        """Return the rows and columns of a matrix on one rank."""
        if ".o_proj." in m.name or ".down_proj." in m.name:
            return m.rows, m.columns // self.tensor
        keys = ".k_proj." in m.name or ".v_proj." in m.name
        return m.rows // (min(self.tensor, self.kv_heads) if keys else self.tensor), m.columns


Layouts = Mapping[int, Sequence[Matrix]]
"""The quantized matrices of a model at every tensor-parallel size that divides it."""


@dataclass(frozen=True)
class PlanReport:
    """The result of the checks, printed before a run.

    Attributes:
        plan: the plan that was checked.
        num_layers: layers of the model.
        computed: `native` or `emulated` for the trainer's quantized products, "" if there are none.
        apart: reasons why the engines do not multiply the same operands as the trainer. None if nothing is quantized.
        warnings: other remarks for the user.
    """

    plan: PrecisionPlan
    num_layers: int
    computed: str
    apart: tuple[str, ...] | None
    warnings: tuple[str, ...]


def check_plan(
    plan: PrecisionPlan,
    layouts: Layouts,
    *,
    tensor: int,
    tokens: int,
    num_layers: int,
    computed: str,
    engine: str,
    foreign: bool,
    engine_cut: EngineCut = EngineCut(),
) -> PlanReport:
    """Check a plan against the matrices of a model.

    Args:
        plan: the plan to check.
        layouts: the quantized matrices at every tensor-parallel size that divides the model.
        tensor: number of tensor-parallel ranks.
        tokens: tokens that one rank multiplies at a time.
        num_layers: layers of the model.
        computed: `native` or `emulated`, "" if the trainer quantizes nothing.
        engine: `embedded` or `sglang`.
        foreign: True if the servers were started by another process.
        engine_cut: how an SGLang server divides matrices.

    Raises:
        PrecisionError: the plan cannot work. The message names the tensor, its dimension and the nearest
            tensor-parallel size that works.
    """
    if computed == "native":
        _refuse_unaligned(plan, layouts, tensor)
        unit = _ALIGN_TOKENS[plan.recipe]
        if tokens % unit:
            raise PrecisionError(
                f"precision.recipe {plan.recipe} multiplies {tokens} tokens a rank, which must be a multiple of {unit} "
                "on tensor cores: change optimizer.tokens_per_microbatch so that a rank's part is "
                f"{-(-tokens // unit) * unit}"
            )
    ragged = _ragged_for_sglang(plan, layouts[tensor], engine_cut)
    if ragged is not None and engine == "sglang":
        mend = " or lower rollout.sglang.tensor" if engine_cut.tensor > 1 else ""
        raise PrecisionError(f"{ragged}: set precision.rollout to bf16{mend}")
    warnings = [*_scale_warnings(plan), *_dtype_warnings(plan)]
    if ragged is not None and foreign:
        warnings.append(f"{ragged}, and would refuse these weights; the embedded engine takes them")
    low = plan.trains_low or plan.rolls_out_low
    if plan.kept and not low:
        warnings.append("precision.first_last_bf16: true has no effect: nothing is quantized")
    apart = tuple(_apart(plan, layouts, tensor)) if low else None
    return PlanReport(plan, num_layers, computed, apart, tuple(warnings))


def blocks_coincide(matrix: Matrix) -> bool:
    """Return True if the 128 x 128 blocks of the matrix are also blocks of the trainer's parameter.

    That is: every block of the parameter that holds rows of this matrix is exactly one block of the matrix.
    """
    return _off_grid(matrix) is None


def _off_grid(m: Matrix) -> str | None:
    if m.local_columns != m.columns and m.local_columns % BLOCK:
        return f"{m.local_columns} columns per rank not divisible by {BLOCK}"
    for run in m.runs:
        both_end = run.start + run.rows == m.rows and run.at + run.rows == m.local_rows
        if run.start % BLOCK or run.at % BLOCK or (run.rows % BLOCK and not both_end):
            return f"its {run.rows} rows from row {run.at} of {m.parameter} are not whole blocks of {BLOCK}"
    return None


def _off_mx_grid(m: Matrix) -> str | None:
    if m.local_columns != m.columns and m.local_columns % 32:
        return f"{m.local_columns} columns per rank not divisible by 32"
    return None


def _off_nvfp4_scale(m: Matrix) -> str | None:
    """Return why the tensor's one fp32 scale differs: the trainer takes it from the whole parameter of a rank."""
    if (m.local_rows, m.local_columns) == (m.rows, m.columns):
        return None
    return f"the fp32 scale is that of {m.parameter}, [{m.local_rows}, {m.local_columns}] on a rank"


# Why a matrix has other codes in the trainer than on the wire, by format of the weights without its element.
_OFF_GRID: Mapping[str, Callable[[Matrix], str | None]] = {
    "fp8_128x128": _off_grid,
    "mxfp8": _off_mx_grid,
    "nvfp4_16x16": _off_nvfp4_scale,
}


def _refuse_unaligned(plan: PrecisionPlan, layouts: Layouts, tensor: int) -> None:
    align = _ALIGN[plan.recipe]

    def unaligned(m: Matrix) -> str | None:
        for count, dimension in ((m.local_rows, "rows"), (m.local_columns, "columns")):
            if count % align:
                return f"{count} {dimension} per rank (of {m.parameter}) not divisible by {align}"
        return None

    for matrix in layouts[tensor]:
        found = unaligned(matrix)
        if found is not None:
            able = [size for size, matrices in layouts.items() if not any(map(unaligned, matrices))]
            raise PrecisionError(
                f"{matrix.name}: {found}, which precision.recipe {plan.recipe} needs on tensor cores; "
                f"{_nearest(able, tensor)}"
            )


def _nearest(able: Sequence[int], tensor: int) -> str:
    if not able:
        return "no parallel.tensor works: set precision.recipe: none"
    nearest = min(able, key=lambda size: (abs(size - tensor), size))
    return f"the nearest parallel.tensor that works is {nearest}"


def _ragged_for_sglang(plan: PrecisionPlan, matrices: Sequence[Matrix], cut: EngineCut) -> str | None:
    """Return why SGLang cannot use these matrices in block FP8, None if it can.

    SGLang's block FP8 checks the rows of every fused part on a rank, and quantizes inputs in whole groups of 128.
    """
    if not plan.wire.startswith("fp8_128x128") or plan.dequantized:
        return None
    for m in matrices:
        for count, dimension in zip(cut.part(m), ("rows", "columns"), strict=True):
            if count % BLOCK:
                place = f" on each of {cut.tensor} ranks of a server" if cut.tensor > 1 else ""
                return (
                    f"{m.name}: {count} {dimension}{place} not divisible by {BLOCK}, which SGLang needs for block FP8"
                )
    return None


def _scale_warnings(plan: PrecisionPlan) -> list[str]:
    """Warn if trainer and engines have the same blocks but different scales: then almost all codes differ."""
    ours, theirs = plan.weights, plan.engine_weights
    if ours == theirs or ours.removesuffix("_pow2") != theirs.removesuffix("_pow2"):
        return []
    trainer, engines = ("power-of-two", "fp32") if ours.endswith("_pow2") else ("fp32", "power-of-two")
    mend = "false" if ours.endswith("_pow2") else "true"
    other = "fp8_blockwise_pow2" if ours.endswith("_pow2") else "fp8_blockwise"
    return [
        f"the trainer's scales are {trainer} and the engines' {engines}: about 99 % of the codes differ and the "
        f"weights by 4 %; set precision.pow2_scales: {mend}, or precision.rollout: {other}"
    ]


def _dtype_warnings(plan: PrecisionPlan) -> list[str]:
    if (plan.train == "fp16") == (plan.engine == "fp16"):
        return []
    if plan.train == "fp16":
        return [
            f"precision.train is fp16 (11 bits) and the engines compute in {plan.engine}: rollout: fp16 would give "
            "them the trainer's weights and roundings"
        ]
    return [
        f"the engines are fp16, whose largest number is 65504, and the trainer is {plan.train}: larger weights are "
        "refused"
    ]


def _apart(plan: PrecisionPlan, layouts: Layouts, tensor: int) -> list[str]:
    """Return why the engines' operands differ from those of the trainer's forward pass, empty if equal: unified FP8."""
    if not plan.trains_low:
        return [f"the trainer multiplies in {plan.train} (precision.recipe: none)"]
    if not plan.rolls_out_low:
        return [f"the engines multiply in {plan.engine} (precision.rollout: {plan.engine})"]
    reasons = []
    if plan.weights != plan.engine_weights:
        reasons.append(f"weights are {plan.weights} in the trainer and {plan.engine_weights} in the engines")
    else:
        reasons += _blocks_apart(layouts, tensor, plan.weights)
    if plan.inputs != plan.engine_inputs:
        one_key = plan.weights == plan.engine_weights and plan.engine_inputs == plan.engine and not plan.dequantized
        one_key = one_key and plan.inputs.startswith(("fp8_1x128", "mxfp8"))
        mend = " (precision.rollout_activations: fp8)" if one_key else ""
        reasons.append(f"inputs are {plan.inputs} in the trainer and {plan.engine_inputs} in the engines{mend}")
    return reasons


def _blocks_apart(layouts: Layouts, tensor: int, weights: str) -> list[str]:
    apart = _OFF_GRID.get(weights.split("_e4m3")[0], lambda _: None)
    off = [(m.name, reason) for m in layouts[tensor] if (reason := apart(m)) is not None]
    if not off:
        return []
    able = [size for size, matrices in layouts.items() if all(apart(m) is None for m in matrices)]
    mend = _nearest(able, tensor) if able else "no parallel.tensor mends it"
    name, reason = off[0]
    return [
        f"{len(off)} of {len(layouts[tensor])} matrices have other blocks in the trainer than on the wire, so other "
        f"codes: {name}: {reason}; {mend}"
    ]
