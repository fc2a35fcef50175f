"""Slurm's host lists and counts are expanded as Slurm writes them, and anything else is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.launch.conductor.nodelist import expand_counts, expand_hosts

LISTS = {
    "node1": ["node1"],
    "node[1-3]": ["node1", "node2", "node3"],
    "n[01-03,7]": ["n01", "n02", "n03", "n7"],
    "n[09-11]": ["n09", "n10", "n11"],
    "n[01-03,7],m5-[1-2]": ["n01", "n02", "n03", "n7", "m5-1", "m5-2"],
    "r[1-2]c[1-2]": ["r1c1", "r1c2", "r2c1", "r2c2"],
    "gpu[1-2]-ib": ["gpu1-ib", "gpu2-ib"],
    "a,b.example.org,c[3]": ["a", "b.example.org", "c3"],
    "n[001]": ["n001"],
    " n[1-2] ": ["n1", "n2"],
    "": [],
}


@pytest.mark.parametrize("text", LISTS)
def test_a_list_of_hosts(text: str) -> None:
    assert expand_hosts(text) == LISTS[text]


@pytest.mark.parametrize("text", ["n[1-", "n1]", "n[[1]]", "n[a-b]", "n[3-1]", "n[]", "n[0-999999]", "n[0-999][0-999]"])
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="host list"):
        expand_hosts(text)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50), st.integers(1, 9), st.integers(1, 4)), min_size=1)
)
def test_ranges_have_their_width_and_length(parts: list[tuple[str, int, int, int]]) -> None:
    text = ",".join(f"{name}[{first:0{width}d}-{first + more:0{width}d}]" for name, first, more, width in parts)
    hosts = expand_hosts(text)
    assert len(hosts) == sum(more + 1 for _, _, more, _ in parts)
    name, first, _, width = parts[0]
    assert hosts[0] == f"{name}{first:0{width}d}"


@pytest.mark.parametrize(("text", "counts"), [("4", [4]), ("4(x2),3", [4, 4, 3]), ("1(x3)", [1, 1, 1])])
def test_tasks_per_node(text: str, counts: list[int]) -> None:
    assert expand_counts(text) == counts


def test_what_is_no_count_is_refused() -> None:
    with pytest.raises(ValueError, match="tasks per node"):
        expand_counts("4(y2)")
