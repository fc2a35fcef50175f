"""How often an update waits for a value of the device. On a GPU each time stalls the stream of kernels."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from megatron_rl.objectives import make_objective
from tests.models import make_qwen3
from tests.parallel.steps import OBJECTIVE, make_batch, make_policy

WAITS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero"}


class HostSyncs(TorchFunctionMode):
    """Counts, by file, the calls that would wait for the device if the tensor were there, and copies to a device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.copies = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        self.waits[Path(sys._getframe(1).f_code.co_filename).name] += name in WAITS
        self.copies += name in ("to", "cuda") and any(isinstance(value, torch.device) for value in args)
        return function(*args, **(kwargs or {}))


def count(folder: Path, budget: int, layout: dict[str, int] | None = None) -> HostSyncs:
    """Count what one update in micro-batches of `budget` tokens waits for and copies."""
    policy = make_policy(folder, layout or {}, optimizer={"tokens_per_microbatch": budget})
    batch, objective = make_batch(), make_objective(OBJECTIVE)
    with HostSyncs() as syncs:
        policy.update(batch, objective, objective.norm)
    return syncs


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Counts by number of layers and of micro-batches. The batch has 5 of 192 tokens, or 3 of 384."""
    folder = tmp_path_factory.mktemp("syncs")
    models = {layers: make_qwen3(folder / str(layers), tied=False, layers=layers) for layers in (2, 4)}
    budgets = {5: 192, 3: 384}
    return {(layers, parts): count(model, budgets[parts]) for layers, model in models.items() for parts in budgets}


def waits_of_a_microbatch(counted, layers: int) -> Counter[str]:
    five, three = counted[layers, 5].waits, counted[layers, 3].waits
    return Counter({name: (five[name] - three[name]) / 2 for name in five if five[name] != three[name]})


def test_no_layer_waits_on_local_layers(counted):
    """Objectives check values on a CPU alone (nine calls), and the rows to score are found on the host."""
    for layers in (2, 4):
        assert waits_of_a_microbatch(counted, layers) == {"inputs.py": 9, "packing.py": 1}


def test_a_micro_batch_goes_to_the_device_in_one_copy(counted):
    assert (counted[2, 5].copies - counted[2, 3].copies) / 2 == 1
    assert (counted[4, 5].copies - counted[4, 3].copies) / 2 == 1
