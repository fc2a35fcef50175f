"""The configuration is checked as a whole before anything starts, and an error names the place of the mistake."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.config import Config, load_config, make_config
from megatron_rl.errors import ConfigError

SMALL = """\
model: {path: some/model}
parallel:
  tensor: 2
  sequence: true
rollout: {max_prompt_tokens: 100, max_new_tokens: 28}
optimizer: {tokens_per_microbatch: 128}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return str(caught.value)


def test_a_file_gives_its_values_and_the_defaults_of_the_rest(write):
    config = load_config(write(SMALL))
    assert config.model.path == Path("some/model")
    assert (config.parallel.tensor, config.parallel.sequence, config.parallel.world_size) == (2, True, 2)
    assert config.rollout.temperature == 1.0
    assert config.objective.spec() == {"name": "drpo"}


def test_an_override_replaces_one_key_and_leaves_its_neighbors(write):
    config = load_config(write(SMALL), ["rollout.max_new_tokens=20", "objective.delta=0.15", "run.name=other"])
    assert (config.rollout.max_prompt_tokens, config.rollout.max_new_tokens) == (100, 20)
    assert config.objective.spec() == {"name": "drpo", "delta": 0.15}
    assert config.run.folder == Path("runs/other")


def test_what_makes_advantages_of_rewards_is_no_key_of_the_objective(write):
    config = load_config(write(SMALL), ["objective.advantage=rloo", "objective.overlong_buffer=8"])
    assert (config.objective.advantage, config.objective.overlong_buffer) == ("rloo", 8)
    assert config.objective.spec() == {"name": "drpo"}
    assert "overlong_buffer exceeds" in refusal(write(SMALL), "objective.overlong_buffer=1000000")


def test_the_last_override_of_a_key_wins(write):
    assert load_config(write(SMALL), ["run.seed=1", "run.seed=2"]).run.seed == 2


def test_lists_and_null_can_be_written_in_an_override(write):
    config = load_config(write(SMALL), ["rollout.urls=[http://a:1, http://b:2]", "task.data=null"])
    assert config.rollout.urls == ("http://a:1", "http://b:2") and config.task.data is None


def test_an_unknown_key_is_named_with_its_line_and_the_nearest_key(write):
    path = write(SMALL + "run:\n  steps: 3\n  save_evry: 2\n")
    assert refusal(path) == f"{path}:9: unknown key 'run.save_evry'; did you mean 'run.save_every'?"


def test_an_unknown_section_is_named_with_the_nearest_section(write):
    path = write(SMALL + "rolout: {temperature: 1.0}\n")
    assert refusal(path) == f"{path}:7: unknown key 'rolout'; did you mean 'rollout'?"


def test_an_unknown_key_of_an_override_is_named_as_such(write):
    assert refusal(write(SMALL), "rollout.temprature=0.5") == (
        "override 'rollout.temprature=0.5': unknown key 'rollout.temprature'; did you mean 'rollout.temperature'?"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.steps", "override 'run.steps' must read section.key=value"),
        ("=3", "override '=3' must read section.key=value"),
        ("model.path.name=x", "override 'model.path.name=x': 'path' is not a section"),
        ("run.name=[a", "override 'run.name=[a': the value is not valid YAML"),
    ],
)
def test_an_override_that_cannot_be_read_is_quoted(write, override, message):
    assert refusal(write(SMALL), override).startswith(message)


def test_a_value_of_the_wrong_kind_is_shown_with_its_place(write):
    path = write(SMALL + "run:\n  steps: many\n")
    message = refusal(path)
    assert message.startswith(f"{path}:8: 'run.steps' is 'many'") and "integer" in message


def test_a_missing_model_is_named(write):
    assert refusal(write("run: {steps: 1}\n")) == "key 'model' is missing and has no default"


def test_all_mistakes_are_told_at_once(write):
    message = refusal(write(SMALL), "run.stepz=1", "rollout.temperature=0")
    assert "'run.stepz'" in message and "'rollout.temperature' is 0" in message


def test_a_key_given_twice_is_an_error_with_the_line_of_the_second(write):
    path = write(SMALL + "run:\n  steps: 1\n  seed: 4\n  steps: 2\n")
    assert refusal(path) == f"{path}:10: key 'run.steps' is given twice"


def test_a_section_given_twice_is_an_error(write):
    path = write(SMALL + "model: {path: other}\n")
    assert refusal(path) == f"{path}:7: key 'model' is given twice"


@pytest.mark.parametrize("text", ["model: {path: a", "- a\n- b\n", "just text\n"])
def test_a_file_that_is_no_mapping_of_sections_is_refused(write, text):
    path = write(text)
    assert str(path) in refusal(path)


def test_a_missing_file_is_named(tmp_path):
    assert refusal(tmp_path / "none.yaml") == f"no configuration file at {tmp_path / 'none.yaml'}"


def test_a_trajectory_longer_than_a_microbatch_is_refused_by_the_configuration(write):
    message = refusal(write(SMALL), "rollout.max_new_tokens=29")
    assert "optimizer.tokens_per_microbatch is 128" in message
    assert "rollout.max_prompt_tokens + rollout.max_new_tokens = 129" in message


def test_context_parallel_padding_counts_against_the_budget(write):
    """A trajectory of 131 tokens, padded to a multiple of 2 x context = 8, has 136 tokens."""
    lengths = ["rollout.max_new_tokens=31", "parallel.sequence=false", "parallel.tensor=1", "parallel.context=4"]
    assert load_config(write(SMALL), [*lengths, "optimizer.tokens_per_microbatch=136"])
    assert "one trajectory may have" in refusal(write(SMALL), *lengths, "optimizer.tokens_per_microbatch=128")


def test_the_budget_must_divide_over_tensor_and_context_ranks(write):
    message = refusal(write(SMALL), "optimizer.tokens_per_microbatch=130")
    assert message == "optimizer.tokens_per_microbatch must be a multiple of 2 x context x tensor = 4"


def test_sequence_parallelism_without_tensor_parallelism_is_refused(write):
    assert "sequence: true needs tensor > 1" in refusal(write(SMALL), "parallel.tensor=1")


def test_virtual_stages_without_pipeline_parallelism_are_refused(write):
    assert "virtual_pipeline > 1 needs pipeline > 1" in refusal(write(SMALL), "parallel.virtual_pipeline=2")


def test_an_update_needs_at_least_one_prompt(write):
    assert "updates_per_step exceeds" in refusal(
        write(SMALL), "rollout.prompts_per_step=3", "optimizer.updates_per_step=4"
    )


def test_the_math_task_needs_data(write):
    assert "task.data is required" in refusal(write(SMALL), "task.name=math")


def test_the_tool_task_needs_a_second_turn_and_room_for_it(write):
    tool = ["task.name=tool", "task.tool_tokens=20"]
    assert load_config(write(SMALL), tool).task.max_turns == 3
    assert "task.max_turns is 1" in refusal(write(SMALL), *tool, "task.max_turns=1")
    message = refusal(write(SMALL), "task.name=tool", "task.tool_tokens=28")
    assert "task.tool_tokens is 28" in message and "is 28: lower the former" in message


def test_a_configuration_cannot_be_changed_afterwards(write):
    config = load_config(write(SMALL))
    with pytest.raises(ValueError, match="frozen"):
        config.run.steps = 5


def test_a_resolved_configuration_reads_back_as_itself(write, tmp_path):
    overrides = ["objective.name=grpo", "objective.norm=token_mean", "rollout.urls=[http://a:1]", "task.data=x.jsonl"]
    config = load_config(write(SMALL), overrides)
    copy = tmp_path / "resolved.yaml"
    copy.write_text(config.dump(), encoding="utf-8")
    assert load_config(copy) == config


@given(
    lr=st.floats(1e-12, 1.0),
    temperature=st.floats(1e-3, 10.0),
    name=st.text(
        st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="/."), min_size=1, max_size=60
    ),
    seed=st.integers(-(2**40), 2**40),
    delta=st.floats(1e-3, 1.0),
)
def test_any_resolved_configuration_reads_back_bit_for_bit(tmp_path_factory, lr, temperature, name, seed, delta):
    config = make_config(
        {
            "model": {"path": "m"},
            "rollout": {"temperature": temperature},
            "optimizer": {"lr": lr},
            "objective": {"name": "drpo", "delta": delta},
            "run": {"name": name, "seed": seed},
        }
    )
    copy = tmp_path_factory.mktemp("dump") / "config.yaml"
    copy.write_text(config.dump(), encoding="utf-8")
    assert load_config(copy) == config


def test_every_key_has_a_default_but_the_model_path():
    assert make_config({"model": {"path": "m"}}) == Config(model={"path": "m"})
