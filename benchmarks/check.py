"""Ratios of the quick benchmarks against those in `baseline.json`: what has become slower since?

Every ratio is the time of this package over the time of a plain reference in the same run, so smaller is better, and
the speed of a machine cancels out, mostly. A ratio may exceed its baseline by a tolerance, for noise and other
processors. A benchmark that exceeds it is measured once more, and the smaller ratio counts. Exits with 1 if one still
does. `--update` writes the ratios of this machine as the new baseline.

    make bench-check      # or: python benchmarks/check.py [--only objectives step] [--update]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BASELINE = HERE / "baseline.json"


@dataclass(frozen=True)
class Check:
    """A benchmark, how to run it quickly, and which of its numbers are compared.

    Attributes:
        command: script and arguments.
        ratios: the ratios, by name, in the last JSON line that the script prints.
        tolerance: factor by which a ratio may exceed its baseline.
    """

    command: tuple[str, ...]
    ratios: Callable[[dict[str, Any]], dict[str, float]]
    tolerance: float = 1.25


def _objectives(found: dict[str, Any]) -> dict[str, float]:
    return {row["name"]: row["ratio"] for row in found["rows"]}


def _formats(found: dict[str, Any]) -> dict[str, float]:
    """`precision.py` reports plain over ours."""
    return {
        f"{row['format']}, {way}": 1 / row[way]["ratio"] for row in found["rows"] for way in ("quantize", "dequantize")
    }


CHECKS = {
    "objectives": Check(("objectives.py", "--packed", "--repeat", "15"), _objectives),
    "step": Check(("step.py", "--repeat", "9"), lambda found: {"512 tokens of vocabulary": found["ratio"]}),
    "step 32k": Check(
        ("step.py", "--vocab", "32000", "--tokens", "1024", "--repeat", "5"),
        lambda found: {"32,000 tokens of vocabulary": found["ratio"]},
    ),
    "alp": Check(("alp.py", "--only", "tiny"), lambda found: {"tiny": 1 + found["tiny"]["overhead"]}),
    "formats": Check(("precision.py", "--part", "formats", "--repeat", "7"), _formats),
    "ingest": Check(
        ("ingest.py", "--repeat", "3"), lambda found: {"8 x 1,024 tokens": found["8x1024"]["ratio"]}, tolerance=1.4
    ),
    "rollout": Check(
        ("rollout.py", "--repeat", "3"),
        lambda found: {one["case"]: 1 / one["embedded"]["ratio"] for one in found["results"]},
        tolerance=1.4,
    ),
}


def measure(name: str) -> dict[str, float]:
    """Run a benchmark, and return its ratios as `name: what`."""
    script, *arguments = CHECKS[name].command
    command = [sys.executable, str(HERE / script), *arguments]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"})
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    if ran.returncode or not lines:
        sys.exit(f"{' '.join(command)} ended with {ran.returncode}:\n{ran.stdout[-1000:]}{ran.stderr[-2000:]}")
    return {f"{name}: {what}": ratio for what, ratio in CHECKS[name].ratios(json.loads(lines[-1])).items()}


def processor() -> str:
    """Return the name of the processor, and the number of cores that this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(os.sched_getaffinity(0))} cores"


def exceeding(found: dict[str, float], baseline: dict[str, float]) -> dict[str, float]:
    """Return the limits that ratios exceed, by name: the baseline times the benchmark's tolerance."""
    limits = {name: ratio * CHECKS[name.partition(":")[0]].tolerance for name, ratio in baseline.items()}
    return {name: limits[name] for name, ratio in found.items() if ratio > limits.get(name, ratio)}


def measure_again(found: dict[str, float], baseline: dict[str, float]) -> dict[str, float]:
    """Measure the benchmarks again that have a ratio beyond its limit. Return the smaller ratios."""
    for name in dict.fromkeys(name.partition(":")[0] for name in exceeding(found, baseline)):
        print(f"{name}, once more ...", file=sys.stderr, flush=True)
        found = found | {what: min(ratio, found.get(what, ratio)) for what, ratio in measure(name).items()}
    return found


def show(found: dict[str, float], baseline: dict[str, float]) -> None:
    """Print every ratio beside its baseline. Names that only the baseline has are printed, too."""
    limits = exceeding(found, baseline)
    print(f"{'ratio of ours to plain':44} {'baseline':>9} {'now':>7}")
    for name, ratio in found.items():
        known = f"{baseline[name]:.2f}" if name in baseline else "-"
        worse = f"  slower than {limits[name]:.2f}" if name in limits else ""
        print(f"{name:44} {known:>9} {ratio:7.2f}{worse}")
    for name in sorted(baseline.keys() - found.keys()):
        print(f"{name:44} {baseline[name]:9.2f}  not measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(CHECKS), choices=list(CHECKS))
    parser.add_argument("--update", action="store_true", help="write the baseline")
    args = parser.parse_args()
    found: dict[str, float] = {}
    for name in args.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        found |= measure(name)
    stored = json.loads(BASELINE.read_text()) if BASELINE.exists() else {"ratios": {}}
    chosen = {name: ratio for name, ratio in stored["ratios"].items() if name.partition(":")[0] in args.only}
    other = stored.get("processor") not in (None, processor())
    if other:
        print(f"the baseline is of another processor: {stored['processor']}")
    found = found if args.update else measure_again(found, chosen)
    show(found, chosen)
    if args.update and other and set(args.only) != set(CHECKS):
        sys.exit("a part of a baseline cannot come from another processor: leave out --only")
    if args.update:
        kept = {name: ratio for name, ratio in stored["ratios"].items() if name not in chosen}
        ratios = kept | {name: round(ratio, 3) for name, ratio in found.items()}
        BASELINE.write_text(json.dumps({"processor": processor(), "ratios": ratios}, indent=2) + "\n")
    elif slower := exceeding(found, chosen):
        sys.exit(f"slower than the baseline allows: {', '.join(slower)}")


if __name__ == "__main__":
    main()
