"""The page on checkpoints does what it says: the family that it adds has the logits of transformers."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megatron_rl.convert.compare_logits import compare_logits
from megatron_rl.errors import ConfigError
from megatron_rl.weights import families
from tests.families import SIZES, randomize

PAGE = Path(__file__).parents[3] / "docs" / "checkpoints.md"


def test_the_family_of_the_page_has_the_logits_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(block.strip().split("\n")) <= 36
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["seed_oss"](**SIZES), dtype=torch.float32)
    randomize(model, 0)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="'SeedOssForCausalLM' is not supported"):
        compare_logits(tmp_path, 16)
    names: dict[str, Any] = {}
    exec(block, names)
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, names["FAMILY"]))
    found = compare_logits(tmp_path, 16)
    assert found.difference < 5e-6 < found.largest
