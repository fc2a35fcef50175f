"""A run whose SGLang servers would sample from another model than the trained one is refused."""

from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import make_config
from megatron_rl.errors import ConfigError
from megatron_rl.plan.engine_check import check_engine
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.hf_model import check_folder
from tests.families import make_family


def check(folder: Path, name: str, engine: str = "sglang", longest: int = 32, **keys: Any) -> None:
    model = check_folder(HFFolder(make_family(folder, name, **keys)))
    rollout = {"engine": engine, "max_prompt_tokens": longest // 2, "max_new_tokens": longest // 2}
    check_engine(make_config({"model": {"path": str(folder)}, "rollout": rollout}), model.family, model.shape)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mistral", "ignores the window of 16 keys, though trajectories have 32"),
        ("qwen2_windows", "ignores the window of 16 keys"),
        ("qwen3_moe_dense_layer", "ignores that some layers have no experts"),
        ("qwen3_dynamic", "ignores that dynamic RoPE changes nothing"),
    ],
)
def test_what_sglang_ignores_is_refused_with_sglang_alone(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"rollout.engine: sglang {words}"):
        check(tmp_path / "sglang", name)
    check(tmp_path / "embedded", name, engine="embedded")


@pytest.mark.parametrize("name", ["llama3", "qwen3_yarn", "glm4_moe", "gpt_oss"])
def test_what_sglang_computes_is_not_refused(tmp_path: Path, name: str) -> None:
    check(tmp_path, name)


def test_a_window_that_no_trajectory_exceeds_is_not_refused(tmp_path: Path) -> None:
    check(tmp_path, "mistral", longest=16)
