"""A free port stays free until a server binds it."""

import socket
from pathlib import Path

import pytest

from megatron_rl import ports
from megatron_rl.ports import free_port


def test_a_port_is_free_and_is_none_that_the_kernel_gives_out() -> None:
    for _ in range(50):
        port = free_port()
        assert 10_000 <= port < ports._first_ephemeral()
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))


@pytest.mark.parametrize("first", [1024, 10_000, 10_240])
def test_where_the_kernel_gives_out_nearly_every_port_any_free_one_is_returned(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "range").write_text(f"{first}\t65535\n")
    monkeypatch.setattr(ports, "_EPHEMERAL", tmp_path / "range")
    found = {free_port() for _ in range(50)}
    assert len(found) > 25, "programs that start together hardly meet"
