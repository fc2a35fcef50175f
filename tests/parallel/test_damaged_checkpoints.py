"""A damaged checkpoint is never loaded, none runs code, and the older one is used: the table `tests.cases.checkpoints`.

The checkpoints are saved asynchronously by two ranks, with the smallest dense model and the smallest experts.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint import FileSystemReader

from tests.cases.checkpoints import CASES
from tests.models import make_qwen3, make_qwen3_moe

STEPS = "tests.parallel.checkpoint_steps"
SMALLEST = {"layers": 1, "vocab": 32, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
SMALLEST |= {"head_dim": 8}
KINDS = ("dense", "experts")


@dataclass(frozen=True)
class Saved:
    """Two checkpoints of one model, and the digests of the weights in each."""

    arguments: dict[str, Any]
    folder: Path
    digests: list[dict[str, str]]


def save(two_ranks, folder: Path, model: Path, **layout: Any) -> Saved:
    arguments = {"model": model, "layout": layout}
    digests = two_ranks.run(STEPS, "save_two", folder=folder / "saved", **arguments)[0]
    return Saved(arguments, folder / "saved", digests)


@pytest.fixture(scope="module")
def dense(two_ranks, tmp_path_factory) -> Saved:
    folder = tmp_path_factory.mktemp("dense")
    return save(two_ranks, folder, make_qwen3(folder / "model", tied=False, intermediate_size=16, **SMALLEST), tensor=2)


@pytest.fixture(scope="module")
def experts(two_ranks, tmp_path_factory) -> Saved:
    folder = tmp_path_factory.mktemp("experts")
    model = make_qwen3_moe(folder / "model", experts=4, moe_intermediate_size=8, **SMALLEST)
    return save(two_ranks, folder, model, tensor=2, expert=2, sequence=True)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in KINDS for name, case in CASES.items() if kind == "experts" or not case.experts_only],
)
def test_resume_takes_the_newest_checkpoint_only_if_it_is_whole(two_ranks, request, tmp_path, kind, name):
    case, saved = CASES[name], request.getfixturevalue(kind)
    found, other = two_ranks.run(
        STEPS, "resume_after", saved=saved.folder, case=name, scratch=tmp_path, **saved.arguments
    )
    step = 2 if case.used else 1
    for file, outcome, said, digests in found:
        assert (outcome, digests) == (step, saved.digests[step - 1]), (file, said)
        assert re.search(case.says.replace("{file}", re.escape(file)), said), (file, said)
        assert ("trying an older one" in said) != case.used
    assert [outcome for _, outcome, *_ in other] == [step] * len(found) and not any(said for _, _, said, _ in other)
    assert not list(tmp_path.rglob("executed"))


@pytest.mark.parametrize(
    ("kind", "norm"), [("dense", "mlp.linear_fc1.layer_norm_weight"), ("experts", "pre_mlp_layernorm.weight")]
)
def test_the_norm_before_the_feed_forward_network_has_the_name_of_megatron_lm(request, kind, norm):
    """As in https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/1821, for other norms."""
    folder = request.getfixturevalue(kind).folder / "step_000002"
    names = FileSystemReader(folder).read_metadata().state_dict_metadata
    norms = {name for name in names if "pre_mlp" in name or "mlp.linear_fc1.layer_norm" in name}
    assert f"decoder.layers.{norm}" in norms and all(name.endswith(f"decoder.layers.{norm}") for name in norms)
    assert len(norms) == 3, "the parameter and two moments of the optimizer"
