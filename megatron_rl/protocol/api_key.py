"""The key that engines want from their trainer, as SGLang's: `Authorization: Bearer KEY`. It lies in a 0600 file."""

import ipaddress
import os
import secrets
import stat
from pathlib import Path

from megatron_rl.errors import UserError

_LONGEST = 1024


def read_key(path: Path) -> str:
    """Return the key in a file.

    Raises:
        UserError: the file cannot be read, other users can read it, or it holds no key.
    """
    try:
        status = path.stat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
    except OSError as error:
        raise UserError(f"the API key cannot be read from {path} ({error.strerror}): write it there") from error
    if status.st_mode & 0o077:
        raise UserError(f"{path} holds an API key, and other users may open it: chmod 600 {path}")
    key = content.decode("ascii", "replace").strip()
    if not key or len(key) > _LONGEST or not key.isascii() or not all(33 <= ord(char) < 127 for char in key):
        raise UserError(
            f"{path} holds no API key: write one line of printable ASCII there, for example 32 random letters"
        )
    return key


def new_key() -> str:
    """Return a random key. It never begins with `-`, which would make it an option on SGLang's command line."""
    return secrets.token_hex(32)


def write_private(path: Path, line: str) -> None:
    """Write a line to a new file that only this user can open. Raises OSError."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(line + "\n")


def key_headers(key: str | None) -> dict[str, str]:
    """Return the headers of a request to an engine that wants this key; none without a key."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def is_loopback(host: str) -> bool:
    """Return whether an address to listen on can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
