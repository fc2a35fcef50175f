"""The file with which a running engine says where it is: one JSON object, replaced as a whole.

`{"url": ..., "pid": ..., "host": ..., "version": ...}`. `version` is that of this package. A launcher may write the
file for other engines; `url` is enough.
"""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path

from megatron_rl import __version__
from megatron_rl.errors import UserError
from megatron_rl.files import parse_json, replace_file

WILDCARDS = ("0.0.0.0", "::")  # addresses of all interfaces


def write_ready_file(path: Path, host: str, port: int) -> None:
    """Say that this process serves on a port.

    Args:
        path: the file; its folder is made.
        host: address that the server listens on. For a wildcard, the name of this machine is written.
        port: the port.

    Raises:
        UserError: the file cannot be written.
    """
    name = socket.gethostname()
    reached = name if host in WILDCARDS else f"[{host}]" if ":" in host else host
    entry = {"url": f"http://{reached}:{port}", "pid": os.getpid(), "host": name, "version": __version__}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(entry).encode() + b"\n")
    except OSError as error:
        raise UserError(f"--ready-file {path} cannot be written ({error}): choose another place") from error


def remove_ready_file(path: Path) -> None:
    """Remove the file again, unless another process has written it meanwhile."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        entry = parse_json(path.read_bytes())
        if (entry["pid"], entry["host"]) == (os.getpid(), socket.gethostname()):
            path.unlink()


def read_ready_file(path: Path) -> tuple[str, list[object]]:
    """Return the URL in a file, and what identifies the process there.

    Raises OSError or ValueError.
    """
    entry = parse_json(path.read_bytes())
    url = entry.get("url") if isinstance(entry, dict) else None
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        raise ValueError(f"its url is {str(url)[:100]!r}")
    return url.rstrip("/"), [entry.get("pid"), entry.get("host")]
