"""The files of `RUN/control`, by which conductor, ranks and commands talk: JSON, replaced as a whole."""

import json
import os
from typing import Any, Dict, List, Optional

ATTEMPTS = "attempts.jsonl"


def write_json(path: str, value: Any) -> None:
    """Replace a file by a value as JSON: write a file next to it, sync it, rename it."""
    partial = "%s.%d.partial" % (path, os.getpid())
    with open(partial, "w") as file:
        json.dump(value, file)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_json(path: str) -> Optional[Dict[str, Any]]:
    """Return the mapping in a file; None if the file is missing or holds no JSON mapping."""
    try:
        with open(path) as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError):  # the last one for nesting that is too deep
        return None
    return value if isinstance(value, dict) else None


def read_json_lines(path: str) -> List[Dict[str, Any]]:
    """Return the complete lines of a file of JSON lines; a damaged line, such as one cut by a crash, is left out."""
    try:
        with open(path, "rb") as file:
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return found


def append_line(path: str, value: Dict[str, Any]) -> None:
    """Append a value to a file of JSON lines, on a line of its own also after a line cut by a crash."""
    with open(path, "ab+") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            cut = file.read(1) != b"\n"
            file.write(b"\n" if cut else b"")
        file.write(json.dumps(value).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def remove(path: str) -> None:
    """Remove a file if it exists."""
    try:
        os.remove(path)
    except OSError:
        pass


def newest_checkpoint(run: str) -> int:
    """Return the step of the newest complete checkpoint of a run folder; -1 if there is none."""
    folder = os.path.join(run, "checkpoints")
    try:
        names = os.listdir(folder)
    except OSError:
        return -1
    steps = [
        int(name[5:])
        for name in names
        if name.startswith("step_")
        and name[5:].isdecimal()
        and os.path.isfile(os.path.join(folder, name, "complete.json"))
    ]
    return max(steps, default=-1)
