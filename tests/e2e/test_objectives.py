"""Every objective trains three steps of the small arithmetic run at tensor parallel 2, as the command line does."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.objectives import OBJECTIVES
from megatron_rl.ports import free_port
from tests.e2e.command import Command, assert_declared, records
from tests.e2e.conftest import version_of
from tests.e2e.models import ARITHMETIC, make_model
from tests.e2e.objective_steps import sums_batch
from tests.parallel.group import RankGroup
from tests.unit.tasks.char_tokenizer import char_tokenizer

STEPS = 3
KEYS = {
    "gspo": "clip_low: 0.05, clip_high: 0.05",
    "dppo_topk": "top_k: 4",
    "drpo": "delta: dppo_matched",
    "ppo": "corrections: [{name: tis}, {name: geo_mask, low: 0.5, high: 2.0}]",
    "dapo": "overlong_buffer: 1",
    "grpo": "kl_coef: 0.01, entropy_coef: 0.001, ratio_level: cumulative",
}
TEACHER = "teacher: {name: erpd_mse}, teacher_updates: 4, keep: [2], signals: [{denominator: unlearned@2, updates: 2}]"
# erpd_distill uses the token advantages of erpd's second stage. Alone, it clips the advantages of the outcome.
NAMES = [*sorted(OBJECTIVES), "erpd"]


@pytest.fixture(scope="module")
def ranks():
    """A separate group of 2 ranks: each run joins a world and leaves it, which the shared groups must not do."""
    group = RankGroup(2)
    yield group
    group.close()


@pytest.fixture(scope="module")
def server(arithmetic_model, tmp_path_factory):
    """The URL of one engine for all runs. Each run publishes its own weights to it before it samples."""
    port = free_port()
    arguments = ["serve", "--model", str(arithmetic_model), "--port", str(port), "--threads", "1"]
    command = Command(arguments, tmp_path_factory.mktemp("server"), {})
    url = f"http://127.0.0.1:{port}"
    try:
        command.until(lambda: version_of(url))
        yield url
    finally:
        command.end()


@pytest.fixture
def train(ranks, server, small_run, run_folder):
    """A function that trains a few steps at tensor parallel 2. It returns the ranks' results and the run's records."""

    def train(*own: str) -> tuple[list[dict], list[dict]]:
        overrides = [
            "parallel.tensor=2",
            f"rollout.urls=[{server}]",
            f"run.dir={run_folder.parent}",
            f"run.steps={STEPS}",
            "run.save_every=0",
            "rollout.samples_per_prompt=32",
            *own,
        ]
        answers = ranks.run(
            "tests.e2e.objective_steps", "train_run", file=small_run, overrides=overrides, port=free_port()
        )
        assert_declared(run_folder)
        steps = records(run_folder)
        assert [r["step"] for r in steps] == list(range(STEPS))
        assert answers[0]["before"] != answers[0]["after"], "the weights did not move"
        return answers, steps

    return train


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a model like the one that is trained, with other weights."""
    return make_model(tmp_path_factory.mktemp("teacher") / "hf", char_tokenizer(ARITHMETIC), seed=1)


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_trains_at_tensor_parallel_two(train, teacher, name):
    keys = TEACHER if name == "erpd" else KEYS.get(name, "")
    reference = [f"model.reference={teacher}"] if name == "opd" else []
    answers, steps = train(f"objective={{name: {name}{', ' if keys else ''}{keys}}}", *reference)
    assert all(math.isfinite(r["loss"]) and math.isfinite(r["grad_norm"]) for r in steps)
    assert any(0 < r["reward/mean"] < 1 for r in steps), "without a difference in rewards nothing could be learnt"
    asked = answers[0]["asked_logmu"]
    assert all(("kl/k3" in r) == asked for r in steps)
    if name in OBJECTIVES:
        assert asked == ("logmu" in answers[0]["needs"])


def test_a_resumed_run_goes_on_with_its_teacher(train, ranks, server, small_run, run_folder, teacher):
    own = ["objective={name: opd}", f"model.reference={teacher}", f"run.save_every={STEPS}"]
    trained, steps = train(*own)
    assert all(r["grad_norm"] > 0 for r in steps)
    overrides = ["parallel.tensor=2", f"rollout.urls=[{server}]", f"run.dir={run_folder.parent}", *own]
    result = ranks.run(
        "tests.e2e.objective_steps", "resume_run", file=small_run, overrides=overrides, port=free_port()
    )[0]
    assert (result["step"], result["digest"]) == (STEPS, trained[0]["after"])
    model, batch = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32), sums_batch()
    tokens = torch.from_numpy(batch.tokens.astype(np.int64))
    with torch.no_grad():
        scores = torch.log_softmax(model(tokens[None]).logits[0, :-1], -1).gather(-1, tokens[1:, None])[:, 0].numpy()
    np.testing.assert_allclose(result["reference"][1:], scores, atol=1e-5, rtol=0)
    assert np.abs(result["own"][1:] - scores).max() > 1e-2, "the teacher must be another"


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_perturbed_layers_train_and_say_what_the_noise_did(train, level):
    _, steps = train(
        "objective={name: ppo, advantage: grpo}",
        f"alp={{enabled: true, sigma_init: 0.01, level: {level}}}",
        "parallel.sequence=true",
    )
    for r in steps:
        assert 0 < r["alp/sigma_min"] <= r["alp/sigma_mean"] <= r["alp/sigma_max"] and r["alp/sigma/0"] > 0
        assert 0 < r["alp/shift/p75"] < 0.1 and r["alp/unmoved"] < 0.5
        assert r["alp/clean/ratio/q50"] == pytest.approx(1, abs=1e-3), (
            "the engine holds the weights of the first update"
        )
        assert (
            r["alp/perturbed/ratio/q99"] - r["alp/perturbed/ratio/q01"]
            > r["alp/clean/ratio/q99"] - r["alp/clean/ratio/q01"]
        )
        assert any(name.startswith("alp/perturbed/envelope/p98/") for name in r)
