"""A precision plan against a model's shapes: what cannot work is an error, what cannot match between both sides is said.

A 128 x 128 block of a weight that the engine multiplies with is the trainer's own block only if the tensor-parallel cut and
the fused parameters (linear_qkv: q, k, v rows group by group; linear_fc1: gate, then up) put it on the same grid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_rl.errors import PrecisionError
from megatron_rl.precision.plan import PrecisionPlan

BLOCK = 128
# What one rank's operands must be multiples of on tensor cores (nvfp4: 16 bytes of 4-bit codes).
# `tokens`: megatron-core's get_fp8_align_size and get_fp4_align_size.
_ALIGN_TOKENS = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32, "nvfp4": 128}
_ALIGN = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32, "nvfp4": 32}


@dataclass(frozen=True)
class Run:
    """`rows` rows that follow each other in a matrix from row `start` and in a rank's parameter from row `at`."""

    start: int
    at: int
    rows: int


@dataclass(frozen=True)
class Matrix:
    """A Hugging Face matrix [rows, columns] and the trainer's parameter that holds it, at one tensor-parallel size.

    parameter: megatron-core's name; [local_rows, local_columns] on one rank, rows of fused neighbors included.
    runs: where the matrix's rows lie, over all ranks.
    """

    name: str
    rows: int
    columns: int
    parameter: str
    local_rows: int
    local_columns: int
    runs: tuple[Run, ...]


Layouts = Mapping[int, Sequence[Matrix]]
"""The quantized matrices of a model at every tensor-parallel size that divides it."""


@dataclass(frozen=True)
class PlanReport:
    """What a user is told of a plan before a run. computed: the trainer's quantized products are `native` or `emulated`,
    "" where there are none. apart: why the engines do not multiply what the trainer does, None where nothing is quantized.
    """

    plan: PrecisionPlan
    num_layers: int
    computed: str
    apart: tuple[str, ...] | None
    warnings: tuple[str, ...]


def examine(
    plan: PrecisionPlan,
    layouts: Layouts,
    *,
    tensor: int,
    tokens: int,
    num_layers: int,
    computed: str,
    engine: str,
    foreign: bool,
) -> PlanReport:
    """Check a plan at `tensor` tensor-parallel ranks, each of which multiplies `tokens` tokens at a time.

    engine: `embedded` or `sglang`; foreign: servers of somebody else's. Raises PrecisionError naming the tensor, its
    dimension and the nearest tensor-parallel size that works.
    """
    if computed == "native":
        _refuse_unaligned(plan, layouts, tensor)
        unit = _ALIGN_TOKENS[plan.recipe]
        if tokens % unit:
            raise PrecisionError(
                f"precision.recipe {plan.recipe} multiplies {tokens} tokens a rank, which must be a multiple of {unit} on "
                f"tensor cores: change optimizer.tokens_per_microbatch so that a rank's part is {-(-tokens // unit) * unit}"
            )
    ragged = _ragged_for_sglang(plan, layouts[tensor])
    if ragged is not None and engine == "sglang":
        raise PrecisionError(f"{ragged}: set precision.rollout to bf16")
    warnings = [*_scale_warnings(plan), *_dtype_warnings(plan)]
    if ragged is not None and foreign:
        warnings.append(f"{ragged}, and would refuse these weights; the embedded engine takes them")
    low = plan.trains_low or plan.rolls_out_low
    if plan.kept and not low:
        warnings.append("precision.first_last_bf16: true has no effect: nothing is quantized")
    apart = tuple(_apart(plan, layouts, tensor)) if low else None
    return PlanReport(plan, num_layers, computed, apart, tuple(warnings))


def blocks_coincide(matrix: Matrix) -> bool:
    """Whether every 128 x 128 block of the trainer's parameter that holds rows of this matrix is one block of the matrix."""
    return _off_grid(matrix) is None


def _off_grid(m: Matrix) -> str | None:
    if m.local_columns != m.columns and m.local_columns % BLOCK:
        return f"{m.local_columns} columns per rank not divisible by {BLOCK}"
    for run in m.runs:
        both_end = run.start + run.rows == m.rows and run.at + run.rows == m.local_rows
        if run.start % BLOCK or run.at % BLOCK or (run.rows % BLOCK and not both_end):
            return f"its {run.rows} rows from row {run.at} of {m.parameter} are not whole blocks of {BLOCK}"
    return None


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
                f"{matrix.name}: {found}, which precision.recipe {plan.recipe} needs on tensor cores; {_nearest(able, tensor)}"
            )


def _nearest(able: Sequence[int], tensor: int) -> str:
    if not able:
        return "no parallel.tensor works: set precision.recipe: none"
    nearest = min(able, key=lambda size: (abs(size - tensor), size))
    return f"the nearest parallel.tensor that works is {nearest}"


def _ragged_for_sglang(plan: PrecisionPlan, matrices: Sequence[Matrix]) -> str | None:
    """Its block FP8 checks every fused part's rows, and quantizes inputs in whole groups of 128."""
    if not plan.wire.startswith("fp8_128x128") or plan.dequantized:
        return None
    for m in matrices:
        for count, dimension in ((m.rows, "rows"), (m.columns, "columns")):
            if count % BLOCK:
                return f"{m.name}: {count} {dimension} not divisible by {BLOCK}, which SGLang needs for block FP8"
    return None


def _scale_warnings(plan: PrecisionPlan) -> list[str]:
    """Trainer and engines with the same blocks and other scales: almost no code is the same on both sides."""
    ours, theirs = plan.weights, plan.engine_weights
    if ours == theirs or ours.removesuffix("_pow2") != theirs.removesuffix("_pow2"):
        return []
    trainer, engines = ("power-of-two", "fp32") if ours.endswith("_pow2") else ("fp32", "power-of-two")
    mend = "false" if ours.endswith("_pow2") else "true"
    other = "fp8_blockwise_pow2" if ours.endswith("_pow2") else "fp8_blockwise"
    return [
        f"the trainer's scales are {trainer} and the engines' {engines}: about 99 % of the codes differ and the weights by "
        f"4 %; set precision.pow2_scales: {mend}, or precision.rollout: {other}"
    ]


def _dtype_warnings(plan: PrecisionPlan) -> list[str]:
    if (plan.train == "fp16") == (plan.engine == "fp16"):
        return []
    if plan.train == "fp16":
        return [
            f"precision.train is fp16 (11 bits) and the engines compute in {plan.engine}: rollout: fp16 would give them the "
            "trainer's weights and roundings"
        ]
    return [
        f"the engines are fp16, whose largest number is 65504, and the trainer is {plan.train}: larger weights are refused"
    ]


def _apart(plan: PrecisionPlan, layouts: Layouts, tensor: int) -> list[str]:
    """Why the engines' operands are not those of the trainer's forward pass; empty if they are (unified FP8)."""
    if not plan.trains_low:
        return [f"the trainer multiplies in {plan.train} (precision.recipe: none)"]
    if not plan.rolls_out_low:
        return [f"the engines multiply in {plan.engine} (precision.rollout: {plan.engine})"]
    reasons = []
    if plan.weights != plan.engine_weights:
        reasons.append(f"weights are {plan.weights} in the trainer and {plan.engine_weights} in the engines")
    elif plan.weights.startswith("fp8_128x128"):
        reasons += _blocks_apart(layouts, tensor)
    if plan.inputs != plan.engine_inputs:
        one_key = plan.weights == plan.engine_weights and plan.engine_inputs == plan.engine and not plan.dequantized
        mend = " (precision.rollout_activations: fp8)" if one_key else ""
        reasons.append(f"inputs are {plan.inputs} in the trainer and {plan.engine_inputs} in the engines{mend}")
    return reasons


def _blocks_apart(layouts: Layouts, tensor: int) -> list[str]:
    off = [(m.name, reason) for m in layouts[tensor] if (reason := _off_grid(m)) is not None]
    if not off:
        return []
    able = [size for size, matrices in layouts.items() if all(map(blocks_coincide, matrices))]
    mend = _nearest(able, tensor) if able else "no parallel.tensor mends it"
    name, reason = off[0]
    return [
        f"{len(off)} of {len(layouts[tensor])} matrices have other blocks in the trainer than on the wire, so other codes: "
        f"{name}: {reason}; {mend}"
    ]
