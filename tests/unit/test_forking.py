"""What a forked or a started process has of its own."""

import socket
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("first", "writes"), [("", 4), ("write_whole_lines()", 1)])
def test_a_line_is_written_as_a_whole(first, writes):
    """Ranks share a pipe. The control without the call shows that Python writes a line in pieces."""
    code = f"from megatron_rl.forking import write_whole_lines\n{first}\nprint('rank', 1)"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # it keeps what was written apart, apart
    with ours, theirs:
        subprocess.run([sys.executable, "-u", "-c", code], stdout=theirs, check=True)
        theirs.close()
        written = list(iter(lambda: ours.recv(100), b""))
    assert b"".join(written) == b"rank 1\n" and len(written) == writes
