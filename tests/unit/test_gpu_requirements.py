"""The pins for GPUs fit together: those of each side, the two sides, and this package's own ranges.

`tests/data/requires_dist.json` has what the packages that decide say themselves (Requires-Dist of their wheels). Both
files were resolved with `uv pip compile` for Python 3.12 on Linux (x86-64); nothing of them was installed on a GPU.
"""

import json
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
TABLE = json.loads((ROOT / "tests" / "data" / "requires_dist.json").read_text())
OWN = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHON_312 = {"python_version": "3.12", "python_full_version": "3.12.0", "sys_platform": "linux"}
PYTHON_312 |= {"platform_machine": "x86_64", "platform_system": "Linux"}


def pins(name: str) -> dict[str, str]:
    """Return package -> version of a file of pins."""
    lines = (ROOT / "requirements" / name).read_text().split()
    return {canonicalize_name(package): version for package, _, version in (line.partition("==") for line in lines)}


def unmet(requirements: list[str], pinned: dict[str, str], extras: list[str]) -> list[str]:
    """Return the requirements that apply on Linux with Python 3.12 and that the pins do not meet."""
    found = []
    for text in requirements:
        requirement = Requirement(text)
        applies = requirement.marker is None or any(
            requirement.marker.evaluate(PYTHON_312 | {"extra": extra}) for extra in ("", *extras)
        )
        version = pinned.get(canonicalize_name(requirement.name))
        if applies and (version is None or not requirement.specifier.contains(version, prereleases=True)):
            found.append(f"{text}: pinned is {version}")
    return found


@pytest.mark.parametrize("name", ["gpu.txt", "sglang-gpu.txt"])
def test_every_package_that_is_pinned_has_what_it_requires(name: str):
    pinned, checked = pins(name), 0
    for package, content in TABLE.items():
        requirement = Requirement(package)
        if canonicalize_name(requirement.name) not in pinned:
            continue
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), f"the table has {package}"
        needed = [r for r in content["requires"] if not r.startswith("nvidia-modelopt") and "flashinfer" not in r]
        needed = content["requires"] if requirement.name == "sglang" else needed  # of the extra, only the range of TE
        assert unmet(needed, pinned, content["extras"]) == []
        checked += 1
    assert checked >= 2


def test_this_package_runs_with_the_pins():
    assert unmet(OWN["dependencies"], pins("gpu.txt"), []) == []
    (engine,) = OWN["optional-dependencies"]["gpu"]
    assert Requirement(engine).specifier.contains(pins("gpu.txt")["transformer-engine"])


def test_both_sides_have_one_torch_and_one_nccl():
    """NCCL refuses a communicator of two versions: "Mismatched NCCL version detected"."""
    ours, theirs = pins("gpu.txt"), pins("sglang-gpu.txt")
    for package in ("torch", "nvidia-nccl-cu13", "nvidia-cudnn-cu13", "triton"):
        assert ours[package] == theirs[package], package


def test_a_version_that_does_not_fit_is_found():
    broken = pins("gpu.txt") | {"nvidia-nccl-cu13": "2.29.7"}
    assert unmet(TABLE["torch==2.14.1"]["requires"], broken, []) == [
        "nvidia-nccl-cu13==2.30.7; sys_platform == 'linux': pinned is 2.29.7"
    ]
