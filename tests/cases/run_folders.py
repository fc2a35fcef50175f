"""States of a run folder: whether a run may start or go on there, and what the error says."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LOG = '{"kind": "step", "step": 0}\n'
CONFIG = "model: {path: nowhere}\n"


@dataclass(frozen=True)
class FolderCase:
    """One state.

    Attributes:
        name: what it is.
        make: makes the state; it gets run.dir and the run folder, which do not exist.
        refusal: text of the ConfigError or UserError, where RUN is the run folder and DIR is run.dir; None: the run
            may use the folder.
        resume: the run goes on in the folder.
        address: where it was reported.
    """

    name: str
    make: Callable[[Path, Path], object]
    refusal: str | None
    resume: bool = False
    address: str = ""


def nothing(_dir: Path, _run: Path) -> None:
    """Leave run.dir out."""


def holding(file: str, content: bytes | str = b"") -> Callable[[Path, Path], None]:
    """Return a function that makes a run folder with this file."""

    def make(_: Path, run: Path) -> None:
        run.mkdir(parents=True)
        (run / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def holding_folder(name: str) -> Callable[[Path, Path], None]:
    """Return a function that makes a run folder with this folder in it."""
    return lambda _, run: (run / name).mkdir(parents=True)


def holding_link(name: str) -> Callable[[Path, Path], None]:
    """Return a function that makes a run folder with a link to nothing."""

    def make(_: Path, run: Path) -> None:
        run.mkdir(parents=True)
        (run / name).symlink_to("nowhere/at/all")

    return make


def holding_pipe(name: str) -> Callable[[Path, Path], None]:
    """Return a function that makes a run folder with a named pipe, which blocks whoever opens it."""

    def make(_: Path, run: Path) -> None:
        run.mkdir(parents=True)
        os.mkfifo(run / name)

    return make


def closed(path: Callable[[Path, Path], Path], mode: int) -> Callable[[Path, Path], None]:
    """Return a function that makes a run folder and then sets the permissions of a path."""

    def make(parent: Path, run: Path) -> None:
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(CONFIG)
        path(parent, run).chmod(mode)

    return make


FOLDER_THERE = "is a folder, and the run needs a file there"
NO_FOLDER_THERE = "is no folder, and the run needs a folder there"

CASES = (
    FolderCase("no folder yet", nothing, None),
    FolderCase("an empty folder", lambda parent, run: run.mkdir(parents=True), None),
    FolderCase("a folder to go on in that does not exist", nothing, None, resume=True),
    FolderCase("a run is there", holding("log.jsonl", LOG), "RUN already holds a run: pass --resume"),
    FolderCase("a run goes on", holding("log.jsonl", LOG), None, resume=True),
    FolderCase("logs of servers that did not start", holding_folder("servers"), None),
    FolderCase("an incomplete last line", holding("log.jsonl", LOG + '{"kind'), None, resume=True),
    FolderCase("run.dir is a file", lambda parent, run: parent.write_text(""), f"DIR {NO_FOLDER_THERE}"),
    FolderCase(
        "the run folder is a file", lambda parent, run: (parent.mkdir(), run.write_text("")), f"RUN {NO_FOLDER_THERE}"
    ),
    FolderCase(
        "the run folder is a broken link",
        lambda parent, run: (parent.mkdir(), run.symlink_to("nowhere")),
        "RUN is a broken link, and the run needs a folder there",
    ),
    FolderCase(
        "the run folder is a link to itself",
        lambda parent, run: (parent.mkdir(), run.symlink_to(run)),
        "RUN is a broken link, and the run needs a folder there",
    ),
    *(
        FolderCase(f"{name} is a folder", holding_folder(name), f"RUN/{name} {FOLDER_THERE}", resume=name[0] == "l")
        for name in ("config.yaml", "log.jsonl", "samples.jsonl", "plugins.json", "engines_released.json", "in-use")
    ),
    *(
        FolderCase(f"{name} is a file", holding(name), f"RUN/{name} {NO_FOLDER_THERE}")
        for name in ("checkpoints", "tb", "rollouts", "attribution", "servers", "hf", "report")
    ),
    FolderCase("log.jsonl is a pipe", holding_pipe("log.jsonl"), "RUN/log.jsonl is no folder", resume=True),
    FolderCase("config.yaml is a broken link", holding_link("config.yaml"), "RUN/config.yaml is a broken link"),
    FolderCase("junk in config.yaml", holding("config.yaml", b"\x80\x81"), "RUN/config.yaml:1: byte 0x80", resume=True),
    FolderCase("config.yaml of nothing", holding("config.yaml"), "mend or remove RUN/config.yaml", resume=True),
    FolderCase("config.yaml of a list", holding("config.yaml", "- a\n"), "RUN/config.yaml: the top level", resume=True),
    FolderCase("a config.yaml that a new run replaces", holding("config.yaml", b"\x80"), None),
    FolderCase("the config.yaml of a run", holding("config.yaml", CONFIG), None, resume=True),
    FolderCase(
        "junk in log.jsonl", holding("log.jsonl", "{\n" + LOG), "RUN/log.jsonl:1: not a JSON object", resume=True
    ),
    *(
        FolderCase(f"{what} in engines_released.json", holding("engines_released.json", junk), start, resume=True)
        for what, junk, start in (
            ("junk", b"\x80{", "RUN/engines_released.json names the engines"),
            ("nothing", b"", "RUN/engines_released.json names the engines"),
            ("a mapping", b"{}", "it is not a list of URLs"),
            ("numbers", b"[1]", "it is not a list of URLs"),
            ("brackets", b"[" * 100_000, "start these engines again and remove the file"),
            ("URLs", b'["http://a:1"]', None),
        )
    ),
    *(
        FolderCase(
            f"{what} in plugins.json", holding("plugins.json", junk), "RUN/plugins.json is no record", resume=True
        )
        for what, junk in (("junk", b"\x80"), ("a list", b"[]"), ("null", b"null"), ("text", b'{"task.name": "x"}'))
    ),
)

# As a user who is not root.
PERMISSIONS = (
    FolderCase("run.dir is read-only", closed(lambda parent, run: parent, 0o555), None),
    FolderCase("the run folder is read-only", closed(lambda parent, run: run, 0o555), "RUN cannot be written"),
    FolderCase("the run folder cannot be entered", closed(lambda parent, run: run, 0o600), "RUN cannot be written"),
    FolderCase("run.dir cannot be entered", closed(lambda parent, run: parent, 0o600), "Permission denied"),
    FolderCase(
        "config.yaml is read-only", closed(lambda parent, run: run / "config.yaml", 0o400), "RUN/config.yaml cannot"
    ),
    FolderCase(
        "a new run in a read-only run.dir",
        lambda parent, run: (parent.mkdir(), parent.chmod(0o555)),
        "DIR cannot be written by this user",
    ),
)
