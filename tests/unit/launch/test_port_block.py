"""Ports of a job: below the range of outgoing connections, in one block, different for every attempt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.launch.conductor.port_block import FIRST_ENGINE, block_ports, next_block, pick_block


@given(st.integers(1, 10**8), st.integers(1, 50), st.integers(1, 64))
def test_a_block_lies_in_its_range(job: int, attempt: int, engines: int) -> None:
    size = FIRST_ENGINE + engines
    base = pick_block(job, attempt, size)
    ports = block_ports(base, engines)
    assert min(ports) >= 20000 and max(ports) <= 32767 and len(set(ports)) == engines + 2
    after = next_block(base, size)
    assert after >= 20000 and after + size - 1 <= 32767 and after != base


def test_attempts_and_neighboring_jobs_have_different_masters() -> None:
    bases = {pick_block(job, attempt, 12) for job in (100, 101, 102) for attempt in (1, 2, 3)}
    assert len(bases) == 9


def test_a_range_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="block of 20 ports does not fit into ports 21000 to 21010"):
        pick_block(1, 1, 20, (21000, 21010))
