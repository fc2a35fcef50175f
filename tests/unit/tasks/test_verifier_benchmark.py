"""Solutions of the excerpt verify against themselves, none against another answer, also if they are reworded."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_excerpt_is_verified_without_an_error() -> None:
    command = [sys.executable, "benchmarks/verifier.py", "--data", "tests/data/math_excerpt.jsonl", "--formulas", "5"]
    ran = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count(" 0 wrong") == 3 and "math-verify was not started" in ran.stdout
