"""The probe of a weight update has, under every layout, the log-probabilities of a plain forward pass."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.weight_sync.confirmation import ScoreProbe
from tests.parallel.group import RankGroup


def plain_logp(model: Path, tokens: tuple[int, ...]) -> np.ndarray:
    """Return the log-probabilities of all tokens but the first, at temperature 1."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits_TV = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()(ids).logits[0, :-1]
    return torch.log_softmax(logits_TV, -1).gather(-1, ids[0, 1:, None])[:, 0].numpy()


def check(group: RankGroup, model: Path, layout: dict[str, Any], **sections: Any) -> None:
    answers = group.run("tests.parallel.probe_steps", "probe", model=model, layout=layout, **sections)
    probe: ScoreProbe = answers[0][0]
    assert len(probe.tokens) == len(probe.logp) + 1 == 64 and probe.tolerance == 1e-3
    np.testing.assert_allclose(probe.logp, plain_logp(model, probe.tokens), atol=1e-4)
    assert answers == [(probe, {0.7})] * len(answers), "ranks differ, or train at another temperature than before"


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"data": 2}], ids=str)
def test_two_ranks_score_the_probe_as_a_plain_model_does(
    two_ranks: RankGroup, qwen3: Path, layout: dict[str, Any]
) -> None:
    check(two_ranks, qwen3, layout)


def test_replicas_of_a_cut_model_score_the_probe_as_a_plain_model_does(four_ranks: RankGroup, qwen3: Path) -> None:
    check(four_ranks, qwen3, {"tensor": 2, "data": 2, "sequence": True})


def test_where_routing_is_replayed_the_probe_chooses_its_experts_itself(two_ranks: RankGroup, qwen3_moe: Path) -> None:
    check(two_ranks, qwen3_moe, {"data": 2, "expert": 2}, rollout={"routing_replay": True})
