"""Of trainer and engines on the same GPUs, at most one holds its memory once the run has begun."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.config import make_config
from megatron_rl.errors import ConfigError
from megatron_rl.plan import plan_algorithm
from megatron_rl.trainer.turns import Turns


class Gpu:
    """A GPU that holds the memory of trainer and engines, and fails if one takes it while the other has it."""

    def __init__(self) -> None:
        self.holders = {"trainer", "engines"}
        self.events: list[str] = []

    def take(self, who: str) -> None:
        if who in self.holders:
            return
        assert not self.holders, f"{who} takes memory that {self.holders} holds"
        self.holders.add(who)
        self.events.append(f"+{who}")

    def free(self, who: str) -> int:
        if who not in self.holders:
            return 0
        self.holders.remove(who)
        self.events.append(f"-{who}")
        return 1 << 30


class Memory:
    """The trainer's memory on a `Gpu`."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    @property
    def held(self) -> bool:
        return "trainer" in self.gpu.holders

    def release(self) -> int:
        return self.gpu.free("trainer")

    def restore(self) -> None:
        self.gpu.take("trainer")


@pytest.fixture
def turns() -> tuple[Turns, Gpu]:
    """Turns over a GPU on which both sides are in memory."""
    gpu = Gpu()
    engines = SimpleNamespace(release=lambda pool: gpu.free("engines"), resume=lambda pool: gpu.take("engines"))
    lead: Any = SimpleNamespace(offloaded=engines, pool=None)

    def on_lead(work: Callable[[Any], Any]) -> Any:
        return work(lead)

    mesh: Any = SimpleNamespace(barrier=lambda: gpu.events.append("all ranks"), rank=0)
    return Turns(mesh, Memory(gpu), on_lead), gpu


def test_a_side_takes_memory_after_the_other_has_freed_it_on_every_rank(turns, capsys):
    made, gpu = turns
    made.to_engines()
    assert gpu.events == ["-trainer", "all ranks"] and not made.trainer_is_ready
    for _ in range(2):
        made.to_trainer()
        assert made.trainer_is_ready
        made.to_engines()
    assert gpu.events[2:7] == ["-engines", "+trainer", "-trainer", "all ranks", "+engines"]
    assert capsys.readouterr().out.count("rank 0 frees 1 GiB") == 1


def test_a_turn_that_a_side_has_already_changes_nothing(turns):
    made, gpu = turns
    made.to_trainer()
    made.to_trainer()
    assert gpu.events == ["-engines"] and gpu.holders == {"trainer"}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"rollout": {"max_staleness": 1}}, r"max_staleness: 1 does not go with rollout\.colocate"),
        ({"rollout": {"oversample": 1.5}}, r"oversample: 1\.5 .* rollout\.colocate: true offloads the engines"),
        ({"rollout": {"transport": "distributed"}}, r"transport: distributed .* take transport: tensor or disk"),
        ({"run": {"attribute_every": 2}}, r"attribute_every does not go with rollout\.colocate"),
        ({"objective": {"name": "erpd", "teacher": {"name": "erpd_mse"}}}, r"colocate: true .* erpd yet"),
    ],
    ids=["staleness", "oversample", "nccl", "attribution", "erpd"],
)
def test_what_needs_engines_during_the_trainer_s_turn_is_refused(sections: dict[str, Any], words: str):
    rollout = {"colocate": True, **sections.get("rollout", {})}
    with pytest.raises(ConfigError, match=words):
        plan_algorithm(make_config({"model": {"path": "m"}, **sections, "rollout": rollout}))
    assert plan_algorithm(make_config({"model": {"path": "m"}, "rollout": {"colocate": True}})).offloads_engines
