"""Cost of low precision. Each part prints a table, and one JSON line for docs/benchmarks.md.

formats: quantize, dequantize and fake quantization (also of a transposed matrix, as weight gradients need) of every
number format against torch's own conversion of the same matrix to float8_e4m3fn and back to float32, without any scale.
Each round times the plain round trip and one function back to back. The ratio is the median over rounds. On CPU the
time is that of the calling thread, so that other processes count only through the caches they empty.

step: a training step with each recipe, emulated, against the same step in bf16 and in fp32; see precision_step.py.

export: the stream of weights to the engines, for a 100M-parameter model, and its memory; see precision_export.py.

    OMP_NUM_THREADS=1 python benchmarks/precision.py [--part formats --rows 2048 --columns 2048]
                                                     [--dtype bf16 --repeat 15]
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial

import torch
from precision_export import part_export
from precision_step import part_step
from rich.console import Console
from rich.table import Table
from timing import seconds

from megatron_rl.precision.formats import FORMATS, fake_quantize, quantize

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def paired(plain: Callable[[], object], ours: Callable[[], object], args: argparse.Namespace) -> tuple[float, float]:
    """Return median seconds of `ours`, and the median over rounds of plain / ours. Above 1, `ours` is faster."""
    for run in (plain, ours, plain, ours):
        run()
    pairs = [(seconds(plain, args.device), seconds(ours, args.device)) for _ in range(args.repeat)]
    return statistics.median(b for _, b in pairs), statistics.median(a / b for a, b in pairs)


def part_formats(args: argparse.Namespace, console: Console) -> dict[str, object]:
    """Measure each format: millions of elements per second, and the ratio to the plain round trip."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(args.rows, args.columns, generator=generator).to(args.device)
    x = wide.to(DTYPES[args.dtype])
    millions = x.numel() / 1e6

    def plain() -> torch.Tensor:
        return wide.to(torch.float8_e4m3fn).float()

    rows: list[dict[str, object]] = []
    for name in FORMATS:
        quantized = quantize(x, name)
        functions: dict[str, Callable[[], object]] = {
            "quantize": partial(quantize, x, name),
            "dequantize": partial(quantized.dequantize, x.dtype),
            "fake": partial(fake_quantize, x, name),
            "fake, transposed": partial(fake_quantize, x.t(), name),
        }
        times = {key: paired(plain, function, args) for key, function in functions.items()}
        rows.append({"format": name, **{key: {"Melem/s": millions / t, "ratio": r} for key, (t, r) in times.items()}})
    baseline = millions / statistics.median(seconds(plain, args.device) for _ in range(args.repeat))
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, 1 thread"
    speed = f"plain fp32 -> e4m3 -> fp32 {baseline:.0f} Melem/s"
    table = Table(
        "format",
        *(f"{key}\nMelem/s (times plain)" for key in list(rows[0])[1:]),
        title=f"{list(x.shape)} {args.dtype}, {device}, torch {torch.__version__}; {speed}",
    )
    for row in rows:
        cells = [value for value in row.values() if isinstance(value, dict)]
        table.add_row(str(row["format"]), *(f"{cell['Melem/s']:.0f} ({cell['ratio']:.2f})" for cell in cells))
    console.print(table)
    return {"plain": baseline, "rows": rows}


PARTS: dict[str, Callable[[argparse.Namespace, Console], dict[str, object]]] = {
    "formats": part_formats,
    "step": part_step,
    "export": part_export,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    for option, default in (("rows", 2048), ("columns", 2048), ("repeat", 15)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the matrix that is quantized")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    console = Console()
    chosen = PARTS if args.part == "all" else {args.part: PARTS[args.part]}
    for name, part in chosen.items():
        print(json.dumps({**vars(args), "part": name, **part(args, console)}))


if __name__ == "__main__":
    main()
