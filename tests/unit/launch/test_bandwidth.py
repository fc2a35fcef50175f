"""Every two nodes meet once, and the slow node is named, not those that it slows down."""

from itertools import combinations

import pytest

from megatron_rl.launch.bandwidth import pair_rounds, report_lines, slow_nodes


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8, 9])
def test_every_two_ranks_meet_once_and_none_is_twice_in_a_round(ranks):
    rounds = pair_rounds(ranks)
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(range(ranks), 2))
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in rounds)


def test_a_slow_node_is_the_one_that_is_slow_with_all_others():
    rates = {("a", "b"): 20.0, ("a", "c"): 1.5, ("b", "c"): 1.2}
    assert slow_nodes(rates, 10) == ["c"] and slow_nodes(rates, 0) == [] and slow_nodes(rates, 30) == ["a", "b", "c"]
    assert report_lines(rates, 10) == [
        "bandwidth: 3 pairs, median 1.5 GB/s",
        "bandwidth: the slowest pair is b and c, 1.2 GB/s",
        "bandwidth: refused c: at most 1.5 GB/s with any other, 10 are required",
    ]
