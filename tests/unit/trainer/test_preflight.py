"""A run that is known to fail is refused before a process is started."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.attribution.limits import check_gives_weights
from megatron_rl.config import Config, make_config
from megatron_rl.errors import CheckpointError, ConfigError, PrecisionError, UserError
from megatron_rl.plan import run_plan
from megatron_rl.policy.checkpoint_files import NEEDED
from megatron_rl.precision.machine import Machine
from megatron_rl.sft import warm_up
from megatron_rl.trainer.evaluate import evaluate_model
from megatron_rl.trainer.preflight import check, resolve_on_rank
from megatron_rl.trainer.run_folder import check_run_folder
from tests.cases.checkpoints import listed_again
from tests.e2e.models import make_arithmetic_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The folder of the small arithmetic model."""
    return make_arithmetic_model(tmp_path_factory.mktemp("model") / "hf")


def config(model: Path, **sections: dict) -> Config:
    """Return a configuration of arithmetic with this model and these sections."""
    task = {"name": "arithmetic", "max_operand": 2, "held_out": 1}
    return make_config({"model": {"path": str(model)}, "task": task, **sections})


def test_what_can_run_passes(model):
    check(config(model))
    check(config(model, parallel={"tensor": 2, "pipeline": 2}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallel": {"pipeline": 4}}, r"= 4 does not divide 2 layers"),
        ({"rollout": {"max_prompt_tokens": 2000, "max_new_tokens": 96}}, r"= 2096 exceeds the model's .* = 2048"),
        ({"objective": {"name": "dropo"}}, "drpo"),
        ({"objective": {"name": "drpo", "detla": 0.1}}, "delta"),
        ({"objective": {"name": "erpd", "teacher": {"name": "erpd_mse"}, "teacher_update": 2}}, "teacher_updates"),
        ({"rollout": {"max_prompt_tokens": 2}}, "has 4 tokens, rollout.max_prompt_tokens is 2"),
    ],
    ids=["stages", "positions", "objective", "objective_key", "plan", "prompts"],
)
def test_what_cannot_run_is_a_configuration_error(model, sections, message):
    with pytest.raises(ConfigError, match=message):
        check(config(model, **sections))


LOW = [{"recipe": "blockwise"}, {"rollout": "fp8_blockwise", "rollout_activations": "fp8"}]


@pytest.mark.parametrize("precision", LOW, ids=["recipe", "engine inputs"])
def test_an_attribution_that_could_never_be_made_is_refused_before_the_run_and_on_every_rank(
    model, monkeypatch, precision
):
    monkeypatch.setattr(run_plan, "this_machine", lambda: Machine((9, 0), (12, 9), transformer_engine=True, gpus=1))
    asked = config(model, precision={"train": "bf16", **precision}, run={"attribute_every": 5})
    for refuse in (lambda: check(asked), lambda: resolve_on_rank(asked, attributes=True)):
        with pytest.raises(PrecisionError, match=r"Transformer Engine.*run\.attribute_every: 0"):
            refuse()
    check(config(model, precision={"train": "bf16", **precision}))
    check(config(model, precision={"train": "bf16", "rollout": "fp8_blockwise"}, run={"attribute_every": 5}))
    monkeypatch.setattr(run_plan, "this_machine", Machine)
    check(asked)


def test_an_engine_that_cannot_give_its_weights_back_is_refused_by_address_where_they_are_asked_for():
    check_gives_weights("http://ours", {"engine": "embedded", "save_dirs": ["/runs"]}, Path("/runs/a/attribution"))
    with pytest.raises(ConfigError, match=r"http://theirs: .*megatron-rl serve.*run\.attribute_every: 0"):
        check_gives_weights("http://theirs", {"dtype": "bfloat16", "quantization": "fp8"}, Path("/runs"))


def test_a_warm_up_is_refused_a_precision_that_cannot_run_before_it_starts(model, tmp_path):
    with pytest.raises(ConfigError, match="pow2_scales"):
        warm_up(
            config(model, precision={"pow2_scales": True}),
            tmp_path / "warm",
            target=0.5,
            error_rate=0.0,
            batch_size=4,
            max_updates=1,
        )
    assert not (tmp_path / "warm").exists()


def test_a_model_that_never_stops_is_refused(model, tmp_path):
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((model / name).read_text())
        settings["eos_token_id"] = None
        (tmp_path / name).write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").symlink_to(model / "model.safetensors")
    with pytest.raises(ConfigError, match="names no eos_token_id"):
        check(config(tmp_path))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        check(config(tmp_path))


def test_bad_data_is_refused_by_file_and_line(model, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "1+1=", "answer": "2"}\n{"question": "1+1="}\n')
    with pytest.raises(UserError, match=r"data\.jsonl:2: 'answer' is missing"):
        check(config(model, task={"name": "math", "data": str(data), "held_out": 0}))


def test_a_run_folder_is_taken_by_its_log_unless_the_run_is_resumed(model, tmp_path):
    settings = config(model, run={"dir": str(tmp_path), "name": "taken"})
    (tmp_path / "taken" / "servers").mkdir(parents=True)
    check_run_folder(settings, resume=False)
    (tmp_path / "taken" / "log.jsonl").touch()
    check_run_folder(settings, resume=True)
    with pytest.raises(ConfigError, match="already holds a run"):
        check_run_folder(settings, resume=False)


def test_an_evaluation_of_no_problems_is_refused(model):
    with pytest.raises(ConfigError, match=r"eval\.prompts is 0"):
        evaluate_model(config(model))


def test_an_older_student_must_be_on_disk_unless_it_is_the_start_of_a_new_run(model, tmp_path):
    def settings(step: int) -> Config:
        objective = {"name": "erpd", "teacher": {"name": "erpd_mse"}, "signals": [{"denominator": f"student@{step}"}]}
        return config(model, run={"dir": str(tmp_path), "name": "rounds"}, objective=objective)

    check_run_folder(settings(0), resume=False)
    for resume in (False, True):
        with pytest.raises(
            ConfigError, match=r"student@2 .* no usable one \(half-written.* run\.steps=2, then --resume"
        ):
            check_run_folder(settings(2), resume=resume)
    newest = tmp_path / "rounds" / "checkpoints" / "step_000002"
    newest.mkdir(parents=True)
    for name in NEEDED:
        (newest / name).touch()
    listed_again(newest)
    check_run_folder(settings(2), resume=True)
    with pytest.raises(ConfigError, match="student@0"):
        check_run_folder(settings(0), resume=True)


def test_what_is_checked_before_anything_starts_needs_no_megatron_core():
    modules = "megatron_rl.trainer.preflight, megatron_rl.trainer.run_folder"
    program = f"import sys, {modules}; sys.exit('megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0, (
        "a refusal takes seconds longer"
    )
