"""The conductor runs on a bare Python 3.6: it imports the standard library and itself, and uses no newer feature."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_rl.launch.conductor

FOLDER = Path(megatron_rl.launch.conductor.__file__).parent
MODULES = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_the_standard_library_and_its_own_folder(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 6))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            own = name.startswith("megatron_rl.launch.conductor.")
            assert own or name.split(".")[0] in sys.stdlib_module_names, name


def test_no_feature_is_newer_than_python_3_6() -> None:
    vermin = shutil.which("vermin", path=str(Path(sys.executable).parent))
    if vermin is None:
        pytest.skip("no vermin: pip install vermin")
    command = [vermin, "-t=3.6-", "--no-tips", "--violations", str(FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
