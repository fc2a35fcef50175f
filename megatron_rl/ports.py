"""Free TCP ports of this machine."""

import secrets
import socket
from contextlib import suppress
from pathlib import Path

_FIRST, _FEWEST, _TRIES = 10_000, 1_000, 20
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")  # Linux


def free_port() -> int:
    """Return a port of loopback that is free now, if possible one that the kernel does not give out by itself.

    A server binds its port seconds later. Until then any connection may get a port of the kernel's own range.
    """
    below = _first_ephemeral() - _FIRST
    for _ in range(_TRIES if below >= _FEWEST else 0):
        with suppress(OSError):
            return _bind(_FIRST + secrets.randbelow(below))
    return _bind(0)


def _bind(port: int) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
        return int(probe.getsockname()[1])


def _first_ephemeral() -> int:
    return int(_EPHEMERAL.read_text().split()[0]) if _EPHEMERAL.exists() else 49_152  # IANA's, which macOS uses
