"""Writes tests/durations.md: how long each folder of tests takes, and the 25 slowest tests. A pytest plugin.

Use it as `pytest -p tests.durations`, which `make durations` does. Several runs add up: a test's newest time counts.
"""

import os
import platform
from collections import defaultdict
from pathlib import Path

import pytest

SLOWEST = 25
_FILE = Path(__file__).with_suffix(".md")
_KEY = "megatron_rl/durations"
_seconds: dict[str, float] = defaultdict(float)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add set-up, call and tear-down of a test."""
    _seconds[report.nodeid.partition("@")[0]] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the file, in the process that collects the reports."""
    if hasattr(session.config, "workerinput") or session.config.cache is None:
        return
    known = session.config.cache.get(_KEY, {}) | _seconds
    session.config.cache.set(_KEY, known)
    folders: dict[str, list[float]] = defaultdict(list)
    for test, seconds in known.items():
        folders["/".join(test.split("::")[0].split("/")[:2])].append(seconds)
    lines = [
        "# Durations",
        "",
        f"Seconds of set-up, call and tear-down, on {os.cpu_count()} cores ({platform.machine()}). `make durations`",
        "writes this file.",
        "",
        "| folder | tests | seconds |",
        "|---|---|---|",
        *(f"| {name} | {len(found)} | {sum(found):.0f} |" for name, found in sorted(folders.items())),
        "",
        f"## The {SLOWEST} slowest tests",
        "",
        "| seconds | test |",
        "|---|---|",
    ]
    slowest = sorted(known.items(), key=lambda item: -item[1])[:SLOWEST]
    lines += [f"| {seconds:.1f} | `{test.removeprefix('tests/')}` |" for test, seconds in slowest]
    _FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")
