"""Conventions of the package that no linter checks: one name has one meaning, and what is public says what it does."""

import ast
from collections import defaultdict
from pathlib import Path

import megatron_rl

PACKAGE = Path(megatron_rl.__file__).parent
# Stand-ins for names of other packages, and a command that is called like the function it calls.
FOREIGN = ("sglang_cpu",)
COMMANDS = PACKAGE / "cli.py"
# Programs that run alone in another interpreter.
PROGRAMS = (PACKAGE / "sandbox" / "jail.py",)


def modules() -> dict[Path, ast.Module]:
    """Return the syntax tree of every module of the package."""
    found = sorted(PACKAGE.rglob("*.py"))
    own = [path for path in found if not any(part in FOREIGN for part in path.parts)]
    assert len(own) > 150
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in own}


def definitions(*kinds: type[ast.stmt]) -> dict[str, list[Path]]:
    """Return the files in which each public name of these kinds is defined at the top level."""
    places: dict[str, list[Path]] = defaultdict(list)
    for path, tree in modules().items():
        for node in tree.body:
            if isinstance(node, kinds) and not node.name.startswith("_"):
                places[node.name].append(path)
    return places


def twice(places: dict[str, list[Path]]) -> dict[str, list[str]]:
    return {name: [str(path) for path in paths] for name, paths in places.items() if len(paths) > 1}


def test_no_class_name_stands_twice() -> None:
    assert not twice(definitions(ast.ClassDef))


def test_no_public_function_name_stands_twice() -> None:
    places = definitions(ast.FunctionDef, ast.AsyncFunctionDef)
    own = {name: [p for p in paths if p != COMMANDS and p not in PROGRAMS] for name, paths in places.items()}
    assert not twice(own)


def test_no_file_name_stands_twice() -> None:
    places: dict[str, list[Path]] = defaultdict(list)
    for path in modules():
        if path.name != "__init__.py":
            places[path.name].append(path)
    assert not twice(places)


def test_every_module_class_and_public_function_says_what_it_does() -> None:
    silent = []
    for path, tree in modules().items():
        if ast.get_docstring(tree) is None:
            silent.append(str(path))
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                public = not node.name.startswith("_")
                if public and ast.get_docstring(node) is None:
                    silent.append(f"{path}:{node.lineno} {node.name}")
    assert not silent
