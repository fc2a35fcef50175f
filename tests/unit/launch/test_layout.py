"""Which role runs on which node, and which sizes are refused."""

import pytest

from megatron_rl.errors import ConfigError
from megatron_rl.launch.layout import JobLayout, Role, check_tensor_groups, make_layout
from megatron_rl.launch.profile import Profile

GPUS = Profile()
VIRTUAL = Profile(ranks_per_node=1, engines_per_node=1)


def places(layout: JobLayout) -> list[tuple[str, int, int, int, int, int]]:
    return [(r.name, r.group, r.first_node, r.nodes, r.tasks, r.local) for r in layout.roles]


def test_split_puts_engines_after_the_trainer() -> None:
    layout = make_layout("split", 16, 3, 4, None, GPUS)
    assert layout.groups == (4,) and places(layout) == [
        ("engine-0", 0, 2, 1, 1, 0),
        ("engine-1", 0, 2, 1, 1, 1),
        ("engine-2", 0, 3, 1, 1, 0),
        ("trainer", 0, 0, 2, 16, 0),
    ]
    assert all(role.overlap for role in layout.engines) and not layout.roles[-1].overlap


def test_het_puts_engines_into_the_second_group() -> None:
    layout = make_layout("het", 2, 2, 1, None, VIRTUAL)
    assert (
        layout.groups == (2, 2)
        and layout.nodes == 4
        and places(layout)
        == [
            ("engine-0", 1, 0, 1, 1, 0),
            ("engine-1", 1, 1, 1, 1, 0),
            ("trainer", 0, 0, 2, 2, 0),
        ]
    )


def test_het_engines_may_have_nodes_with_other_gpus() -> None:
    layout = make_layout("het", 8, 2, 4, None, Profile(rollout={"gpus_per_node": 4}))
    assert layout.groups == (1, 2) and {role.gpus for role in layout.engines} == {4}


def test_colocated_shares_every_node() -> None:
    layout = make_layout("colocated", 16, 1, 8, None, GPUS)
    assert layout.groups == (2,) and places(layout) == [
        ("engine-0", 0, 0, 1, 1, 0),
        ("engine-1", 0, 1, 1, 1, 0),
        ("trainer", 0, 0, 2, 16, 0),
    ]
    assert all(role.overlap for role in layout.roles)


def test_more_nodes_hold_more_engines() -> None:
    assert len(make_layout("split", 8, 1, 4, 3, GPUS).engines) == 4


def test_a_small_trainer_takes_part_of_a_node() -> None:
    assert make_layout("split", 2, 1, 0, None, GPUS).roles[-1] == Role("trainer", "trainer", 0, 0, 1, 2, gpus=8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("split", 12, 1, 1, None, GPUS), "12 ranks do not fill nodes of 8 ranks"),
        (("split", 16, 1, 1, 2, GPUS), "--nodes 2: mode split needs 2 for 16 ranks and at least 1 for engines"),
        (("colocated", 16, 1, 1, 3, GPUS), "--nodes 3: 16 ranks need 2 nodes"),
        (("split", 8, 1, 16, None, GPUS), "rollout.sglang.tensor is 16, but a node has 8 GPUs"),
        (("split", 8, 1, 8, None, Profile(engines_per_node=2)), "engines_per_node is 2"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_layout(*arguments)


@pytest.mark.parametrize(("tensor", "profile"), [(16, GPUS), (3, GPUS)])
def test_a_tensor_group_stays_inside_a_node(tensor: int, profile: Profile) -> None:
    with pytest.raises(ConfigError, match="would lie across nodes"):
        check_tensor_groups(tensor, profile)
    check_tensor_groups(8, profile)
    check_tensor_groups(tensor, VIRTUAL)
