"""Run the GPU tests within a time budget, the most telling ones first, and write one JSON with the results.

python -m tests.gpu.run [OUT.json]
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.doctor import describe_machine

BUDGET_S = 480.0
# A step of the whole trainer tells most. What follows names the part that is wrong.
ORDER = (
    "test_te_step.py",
    "test_step.py",
    "test_ranks.py",
    "test_sglang.py",
    "test_fused_adam.py",
    "test_head.py",
    "test_copies.py",
    "test_te_quantizers.py",
    "test_scaled_mm.py",
    "test_noise_kernels.py",
)


class Recorder:
    """Plugin of pytest that records every test and skips those that would begin after the budget."""

    def __init__(self, budget_s: float) -> None:
        self.deadline = time.monotonic() + budget_s
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.monotonic() > self.deadline:
            pytest.skip("the time budget is used up")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        entry = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        entry["seconds"] = round(entry["seconds"] + report.duration, 3)
        if report.outcome != "passed" and entry["outcome"] != "failed":
            entry["outcome"] = report.outcome
            entry["why"] = str(report.longrepr)[-2000:]


def main(out: Path) -> int:
    """Run the tests, write the results to `out`, and return pytest's exit code."""
    recorder = Recorder(BUDGET_S)
    began = time.monotonic()
    code = pytest.main([str(Path(__file__).parent / name) for name in ORDER], plugins=[recorder])
    found = describe_machine() | {"seconds": round(time.monotonic() - began, 1), "tests": recorder.tests}
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"results: {out}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "gpu-tests.json")))
