"""A model writes code: the sandbox runs its calls in training and in evaluation, and only its own tokens are trained.

The model is tiny and there are nine problems. So half a minute of warm-up teaches it all of call, output, answer.
"""

import math
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_rl.config import Config, load_config
from megatron_rl.engines.pool import EnginePool
from megatron_rl.engines.processes.embedded import EmbeddedServers
from megatron_rl.errors import ConfigError
from megatron_rl.policy.checkpoint_state import TrainState
from megatron_rl.sampling.rollouts import Rollouts
from megatron_rl.sandbox.select import find_jail
from megatron_rl.tasks import Task, make_task
from megatron_rl.tiny_model import make_tokenizer
from megatron_rl.trainer.metrics import Stopwatch
from megatron_rl.types import Batch
from tests.e2e.command import Command, assert_declared, records
from tests.e2e.models import make_model

OPERANDS = 3
TOOL = f"""\
model: {{path: warm}}
rollout: {{prompts_per_step: 6, samples_per_prompt: 4, max_prompt_tokens: 8, max_new_tokens: 48, timeout_s: 120}}
objective: {{name: drpo, delta: 0.15, advantage: grpo, norm: token_mean}}
optimizer: {{lr: 2.0e-4, beta2: 0.99, updates_per_step: 2, tokens_per_microbatch: 512}}
task: {{name: tool, max_operand: {OPERANDS}, held_out: 1, max_turns: 2, tool_tokens: 12}}
eval: {{prompts: 1, samples: 4}}
run: {{name: tool, steps: 2, save_every: 0, seed: 3}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the configuration and `warm`, a model that calls and is right in most responses."""
    try:
        find_jail()
    except ConfigError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("tool")
    texts = [
        part
        for a in range(OPERANDS)
        for b in range(OPERANDS)
        for part in (f"{a}*{b}=", f"```python\nprint({a}*{b})\n```", f"\n```output\n{a * b}\n```\n", f"#### {a * b}")
    ]
    tokenizer = make_tokenizer(texts * 20, 300)
    tokenizer.chat_template = None
    make_model(folder / "fresh", tokenizer)
    (folder / "tool.yaml").write_text(TOOL, encoding="utf-8")
    learning = ["model.path=fresh", "optimizer.lr=4e-3", "--batch-size=8", "--max-updates=300"]
    command = Command(["warmup", "tool.yaml", "--dest=warm", "--target=0.6", *learning], folder, {})
    try:
        result = command.wait()
    finally:
        command.end()
    assert result.code == 0, result.all
    return folder


@pytest.fixture
def config(folder, monkeypatch, tmp_path) -> Config:
    """The configuration with rollouts that overlap training."""
    monkeypatch.chdir(folder)
    return load_config("tool.yaml", ["rollout.max_staleness=1", f"run.dir={tmp_path}"])


def test_a_batch_trains_on_what_the_model_wrote_and_on_nothing_a_tool_said_and_counts_its_own_calls(config, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    task = make_task(config.task, tokenizer, seed=3, max_prompt_tokens=8)
    with (
        EmbeddedServers(config.model.path, tmp_path, threads=1) as servers,
        EnginePool(servers.urls, timeout_s=120) as pool,
    ):
        rollouts = Rollouts(config, task, tokenizer, pool, need_logmu=True)
        rollouts.begin(TrainState(version=0))
        batches = [rollouts.collect(0, 0, Stopwatch())]
        counts = [rollouts.sampled]
        rollouts.evaluate(0)  # while the groups of the next step run
        batches.append(rollouts.collect(1, 1, Stopwatch()))
        counts.append(rollouts.sampled)
    for batch, sampled in zip(batches, counts, strict=True):
        called = _check(batch, task, tokenizer)
        # Every call has its output in the batch: there is room for it, and calls of the last turn are not run.
        assert sampled["tool/calls"] == called and 0 <= sampled["tool/errors"] <= called
        assert 0 <= sampled["tool/void"] <= len(batch)


def _check(batch: Batch, task: Task, tokenizer: PreTrainedTokenizerBase) -> int:
    """Check the trained tokens of a batch. Return the number of trajectories in which a call was run."""
    answers = {f"{prompt.text}": prompt.answer for prompt in task.train}
    rewarded = called = 0
    for row in range(len(batch)):
        span = slice(batch.cu_seqlens[row], batch.cu_seqlens[row + 1])
        tokens, trained = batch.tokens[span], batch.mask[span] > 0
        asked, own, rest = _parts(tokenizer, tokens, trained)
        assert "output" not in own and (not rest or "```output\n" in rest or not own)
        called += "```output\n" in rest
        if batch.rewards[row]:
            rewarded += 1
            assert own.endswith(f"#### {answers[asked]}<|end|>")
            assert own.count("<|end|>") == 1 + ("```output" in rest)
    assert rewarded > 4 and called > 4
    return called


def _parts(tokenizer, tokens: np.ndarray, trained: np.ndarray) -> tuple[str, str, str]:
    """Return three texts: the prompt, the trained tokens, and the other tokens after the prompt."""
    end = int(np.flatnonzero(tokens == tokenizer.encode("=")[0])[0]) + 1
    rest = ~trained
    rest[:end] = False
    return tuple(tokenizer.decode(tokens[which]) for which in (np.arange(len(tokens)) < end, trained, rest))


def test_a_run_with_tools_learns_from_its_own_tokens_and_logs_its_calls(cli, folder, tmp_path):
    result = cli("train", folder / "tool.yaml", f"model.path={folder / 'warm'}", f"run.dir={tmp_path}")
    assert result.code == 0, result.all
    assert_declared(tmp_path / "tool")
    steps, evaluations = records(tmp_path / "tool"), records(tmp_path / "tool", "eval")
    assert [r["step"] for r in steps] == [0, 1] and [r["step"] for r in evaluations] == [0, 2]
    for record in steps:
        trajectories = round(record["tokens/response"] / record["response_length/mean"])
        assert trajectories == 24
        # Every prompt has four tokens, and every call with an output added at least the fences of the output.
        outputs = record["tokens/total"] - record["tokens/response"] - 4 * trajectories
        assert 6 < record["tool/calls"] <= trajectories and outputs > 4 * 6
        assert record["tool/errors"] <= record["tool/calls"] and record["tool/void"] < trajectories
        assert record["reward/mean"] > 0.2
        # The first update uses the weights that sampled, so the ratio is 1 also after an output.
        assert math.isclose(record["mismatch/ratio/min"], 1, abs_tol=1e-4)
        assert math.isclose(record["mismatch/ratio/max"], 1, abs_tol=1e-4)
    assert sum(r["tool/calls"] for r in steps) > 24
    assert all(0 <= r["eval/sampled"] <= 1 for r in evaluations)
