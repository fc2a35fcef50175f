"""Ports of a job: a block that follows from the job's id and attempt, below the range of outgoing connections."""

from typing import List, Tuple

MASTER, UPDATE_GROUP, FIRST_ENGINE = 0, 1, 10  # offsets in a block
FIRST_PORT, LAST_PORT = 20000, 32767  # Linux gives outgoing connections ports from 32768


def pick_block(job: int, attempt: int, size: int, ports: Tuple[int, int] = (FIRST_PORT, LAST_PORT)) -> int:
    """Return the first port of a block.

    Attempts of a job differ, so that a process left over from an earlier attempt cannot join this one.

    Args:
        job: number of the job.
        attempt: number of the attempt, from 1.
        size: number of ports.
        ports: the first and the last port that may be used.

    Raises:
        ValueError: the range is too small for the block.
    """
    first, last = ports
    places = last - first + 1 - size
    if places < 1:
        raise ValueError("a block of %d ports does not fit into ports %d to %d" % (size, first, last))
    return first + (job * 7 + attempt * 101) % places


def next_block(base: int, size: int, ports: Tuple[int, int] = (FIRST_PORT, LAST_PORT)) -> int:
    """Return the first port of the block after `base`, from the start of the range again at its end."""
    return base + size if base + 2 * size - 1 <= ports[1] else ports[0]


def block_ports(base: int, engines: int) -> List[int]:
    """Return the ports of a block that are used, for a job with this number of engines."""
    return [base + MASTER, base + UPDATE_GROUP] + [base + FIRST_ENGINE + number for number in range(engines)]
