"""Rollouts verify with the reward of the configuration, and do not reuse groups that other code has judged."""

import json
from pathlib import Path

import pytest

from megatron_rl.config import make_config
from megatron_rl.sampling.rollouts import Rollouts
from megatron_rl.tasks import make_task
from megatron_rl.types import Trajectory
from tests.trajectories import make_trajectory
from tests.unit.tasks.char_tokenizer import char_tokenizer

TOKENIZER = char_tokenizer()
REWARD = """\
def f(prompt, response, tokens):
    return {"score": len(tokens), "first": tokens[0], "same": response.replace(" ", "") == prompt}
"""


@pytest.fixture
def rollouts(tmp_path: Path):
    """A function that makes the rollouts of a configuration with a reward, without engines."""
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": TOKENIZER.eos_token_id}))
    (tmp_path / "mine.py").write_text(REWARD)

    def make(**task) -> Rollouts:
        config = make_config({"model": {"path": str(tmp_path)}, "task": {"reward": f"{tmp_path}/mine.py:f", **task}})
        made = make_task(config.task, TOKENIZER, seed=0, max_prompt_tokens=16)
        return Rollouts(config, made, TOKENIZER, None, need_logmu=False)

    return make


def trajectory(number: int, text: str, mask: tuple[int, ...] | None = None) -> Trajectory:
    tokens = TOKENIZER(text)["input_ids"]
    return make_trajectory(number, number // 2, (3,), tokens, mask=mask or [1] * len(tokens))


def test_every_response_is_scored_with_its_own_prompt_and_the_tokens_of_its_last_turn(rollouts):
    made = rollouts()
    prompts = list(made.task.train[:3])
    texts = ["12", "7", prompts[1].text, "+", "1=2", "9"]
    rows = [trajectory(at, text, (1, 0, 1) if text == "1=2" else None) for at, text in enumerate(texts)]
    scores = made.verify(prompts, rows)
    assert [score.value for score in scores] == [2, 1, len(prompts[1].text), 1, 1, 1]
    assert [score.metrics["first"] for score in scores[3:]] == [rows[3].response_tokens[0], rows[4].response_tokens[2],
                                                                rows[5].response_tokens[0]]  # fmt: skip
    assert scores[2].metrics["same"] == 1.0
    assert made.verify(prompts[:1], rows[:2]) == scores[:2]
    made.close()


def test_groups_depend_on_the_source_of_the_reward(rollouts, tmp_path):
    before = rollouts()._settings_key()
    assert rollouts()._settings_key() == before
    (tmp_path / "mine.py").write_text(REWARD + "\n")
    assert rollouts()._settings_key() != before
    assert rollouts(reward="http://127.0.0.1:1/x")._settings_key() != before
