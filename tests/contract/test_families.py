"""Engines serve the families that are trained: their log-probabilities are the trainer's, also after a live update."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_rl.server.app import Access, create_app
from megatron_rl.server.engine import Engine
from tests.contract.conftest import start_servers, without_sglang
from tests.families import make_family
from tests.parallel.group import RankGroup
from tests.serving import serving

TWO_RANKS: dict[str, Any] = {"tensor": 2, "sequence": True}
EXPERTS: dict[str, Any] = {**TWO_RANKS, "expert": 2}
# Biases and tied embeddings; shared experts and the correction bias; latent attention; sinks and windows.
EMBEDDED: Mapping[str, dict[str, Any]] = {
    "qwen2": TWO_RANKS,
    "glm4_moe": EXPERTS,
    "deepseek_v3": EXPERTS,
    "gpt_oss": EXPERTS,
}
# Layout and further keys. Three servers, because each takes half a minute: other families were tried by hand.
SGLANG_FAMILIES: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2": (TWO_RANKS, {"head_dim": 8}),
    "llama3": (TWO_RANKS, {}),
    "glm4_moe": (EXPERTS, {}),
}


def assert_served(group: RankGroup, model: Path, layout: dict[str, Any], url: str, staging: Path) -> None:
    """Check an engine of `model` against a trainer of it. A trainer that is one update ahead must differ."""
    (start, ahead, pushed), *others = group.run(
        "tests.parallel.sync_steps", "update_live_engine", model=model, layout=layout, url=url, staging=staging
    )
    assert all(found == [start, ahead, pushed] for found in others)
    assert start < 1e-4 and pushed < 1e-4, "the engine has the policy's weights"
    assert ahead > 0.05, "the engine has the weights before the update"


def write_byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes: transformers reads those of a few families with a class that knows no words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: 1 + at for at, letter in enumerate(letters)} | {"<eos>": 0}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


@pytest.mark.parametrize("name", EMBEDDED)
def test_two_ranks_update_an_embedded_engine_of_a_family(two_ranks: RankGroup, name: str, tmp_path: Path) -> None:
    model = make_family(tmp_path / "model", name)
    engine = Engine(model, threads=1).start()
    with ExitStack() as stack:
        stack.callback(engine.stop)
        url = stack.enter_context(serving(create_app(engine, Access(save_dirs=(tmp_path,)))))
        assert_served(two_ranks, model, EMBEDDED[name], url, tmp_path / "staging")


@without_sglang
@pytest.mark.sglang
@pytest.mark.slow
@pytest.mark.parametrize("name", SGLANG_FAMILIES)
def test_two_ranks_update_an_sglang_server_of_a_family(two_ranks: RankGroup, name: str, tmp_path: Path) -> None:
    layout, keys = SGLANG_FAMILIES[name]
    model = make_family(tmp_path / "model", name, **keys)
    write_byte_tokenizer(model)
    with start_servers("sglang", model, tmp_path / "logs") as servers:
        assert_served(two_ranks, model, layout, servers.urls[0], tmp_path / "staging")
