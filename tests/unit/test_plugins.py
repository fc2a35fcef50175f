"""A user's own code by import path: what is found is returned, and what is not is an error with file:line."""

import hashlib
import sys
from pathlib import Path

import pytest

from megatron_rl.errors import ConfigError
from megatron_rl.plugins import (
    absolute_import_path,
    accepted_names,
    is_import_path,
    load_plugin,
    raised_place,
    source_digest,
    source_place,
)


@pytest.fixture
def module(tmp_path: Path):
    """A function that writes a file of Python, and returns its path."""

    def write(text: str, name: str = "mine.py") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    yield write
    for name, loaded in list(sys.modules.items()):
        if str(tmp_path) in str(getattr(loaded, "__file__", "")):
            del sys.modules[name]
    sys.path[:] = [path for path in sys.path if path != str(tmp_path)]


def test_an_import_path_is_told_from_a_name_and_from_a_url():
    assert is_import_path("a.py:f") and is_import_path("pkg.mod:C")
    assert not any(map(is_import_path, ("math", "http://host:1/x", "https://host/x")))


def test_a_relative_file_is_relative_to_a_folder_and_a_module_is_not(tmp_path):
    assert absolute_import_path("sub/../a.py:f", tmp_path) == f"{tmp_path}/a.py:f"
    assert absolute_import_path("/x/a.py:f", tmp_path) == "/x/a.py:f"
    assert absolute_import_path("pkg.mod:C", tmp_path) == "pkg.mod:C"


def test_a_file_is_imported_once_and_may_import_its_neighbors(module):
    module("VALUE = 3\n", "neighbor_of_mine.py")
    path = module("from neighbor_of_mine import VALUE\n\n\ndef f():\n    return VALUE\n")
    first = load_plugin(f"{path}:f", "k")
    assert first() == 3 and load_plugin(f"{path}:f", "k") is first


def test_a_module_is_imported_by_its_name():
    assert load_plugin("pathlib:Path", "k") is Path


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("class Mine: ...\n", "Mien", r"k: .*mine.py has no 'Mien'; did you mean 'Mine'\?"),
        ("x = 1\ndef f(:\n", "f", r"k: importing .*mine.py:2 raised SyntaxError"),
        ("x = 1\n\ny = 1 / 0\n", "x", r"k: importing .*mine.py:3 raised ZeroDivisionError: division by zero"),
        ("import no_such_module_here\n", "x", r"mine.py:1 raised ModuleNotFoundError: .*no_such_module_here"),
    ],
    ids=["name", "syntax", "raises", "import"],
)
def test_what_cannot_be_loaded_is_an_error_with_its_place(module, text, name, message):
    with pytest.raises(ConfigError, match=message):
        load_plugin(f"{module(text)}:{name}", "k")


def test_a_file_that_failed_is_read_again_after_it_was_mended(module):
    path = module("x = 1 / 0\n")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        load_plugin(f"{path}:x", "k")
    module("x = 1\n")
    assert load_plugin(f"{path}:x", "k") == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere/mine.py:f", "k: there is no file /nowhere/mine.py"),
        ("no_such_module_here:f", r"no module 'no_such_module_here'; install it, or give a file"),
        ("mine.py", "k is 'mine.py'; give file.py:Name or package.module:Name"),
        ("mine.py:2f", "give file.py:Name"),
    ],
)
def test_a_path_that_names_nothing_is_refused(path, message):
    with pytest.raises(ConfigError, match=message):
        load_plugin(path, "k")


def test_a_digest_is_that_of_the_source(module):
    path = module("x = 1\n")
    assert source_digest(f"{path}:x", "k") == hashlib.sha256(b"x = 1\n").hexdigest()
    assert len(source_digest("json.decoder:JSONDecoder", "k")) == 64
    with pytest.raises(ConfigError, match="sys has no source file"):
        source_digest("sys:path", "k")
    with pytest.raises(ConfigError, match=r"k: there is no file /nowhere/mine\.py"):
        source_digest("/nowhere/mine.py:x", "k")


def test_places_are_file_and_line(module):
    path = module("def f():\n    pass\n\n\ndef g():\n    raise ValueError('no')\n")
    assert source_place(load_plugin(f"{path}:g", "k")) == f"{path}:5"
    assert source_place(len) == "len"
    with pytest.raises(ValueError, match="no") as caught:
        load_plugin(f"{path}:g", "k")()
    assert raised_place(caught.value) == f"{path}:6"


def test_only_the_arguments_that_a_function_takes_are_named():
    offered = ("prompt", "response")
    assert accepted_names(lambda response: 0, offered, "k") == ("response",)
    assert accepted_names(lambda response, other=1, *rest: 0, offered, "k") == ("response",)
    assert accepted_names(lambda **everything: 0, offered, "k") == offered


def test_a_required_argument_that_is_not_given_is_an_error_with_file_and_line(module):
    path = module("\ndef f(responze):\n    pass\n\n\ndef g(response, /):\n    pass\n")
    match = rf"k: f \({path}:2\) requires the argument 'responze'.*did you mean 'response'\?"
    with pytest.raises(ConfigError, match=match):
        accepted_names(load_plugin(f"{path}:f", "k"), ("prompt", "response"), "k")
    with pytest.raises(ConfigError, match=r"g .* requires the argument 'response'"):
        accepted_names(load_plugin(f"{path}:g", "k"), ("prompt", "response"), "k")
