"""How often an update waits for a value of the device. On a GPU each time stalls the stream of kernels."""

from pathlib import Path
from typing import Any

from torch.overrides import TorchFunctionMode

from megatron_rl.objectives import make_objective
from tests.models import make_qwen3
from tests.parallel.steps import OBJECTIVE, make_batch, make_policy

WAITS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero"}


class HostSyncs(TorchFunctionMode):
    """Counts the calls that would wait for the device if the tensor were there."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(function, "__name__", "") in WAITS
        return function(*args, **(kwargs or {}))


def waits(folder: Path, budget: int) -> int:
    """Return how often one update in micro-batches of `budget` tokens waits."""
    policy = make_policy(folder, {}, optimizer={"tokens_per_microbatch": budget})
    batch, objective = make_batch(), make_objective(OBJECTIVE)
    with HostSyncs() as syncs:
        policy.update(batch, objective, objective.norm)
    return syncs.count


def test_an_update_waits_four_times_a_layer_and_micro_batch_and_ten_times_a_micro_batch(tmp_path):
    """The four are of RoPE on local layers, which Transformer Engine's fused kernel replaces on a GPU."""
    two, four = (make_qwen3(tmp_path / str(layers), tied=False, layers=layers) for layers in (2, 4))
    # The batch has 5 micro-batches of 192 tokens, or 3 of 384.
    (two_5, two_3), (four_5, four_3) = ([waits(folder, budget) for budget in (192, 384)] for folder in (two, four))
    per_layer = ((four_5 - four_3) - (two_5 - two_3)) / (2 * 2)
    assert per_layer == 4
    assert (two_5 - two_3) / 2 - 2 * per_layer == 10
