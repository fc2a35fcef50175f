"""The `alp` section accepts legal settings and refuses illegal ones."""

import pytest

from megatron_rl.alp.layer_noise import layer_noise
from megatron_rl.config import make_config
from megatron_rl.errors import ConfigError
from megatron_rl.objectives import OBJECTIVES, Objective
from megatron_rl.objectives.ratio import RatioObjective
from megatron_rl.plan import plan_algorithm, resolve_run
from megatron_rl.trainer.preflight import check

WITHOUT_RATIO = sorted(name for name, kind in OBJECTIVES.items() if not issubclass(kind, RatioObjective))


def objective_of(config) -> Objective:
    return plan_algorithm(config).objective


def configured(alp=None, **sections):
    return make_config({"model": {"path": "x"}, "alp": {"enabled": True, **(alp or {})}, **sections})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, r"alp.sigma_init: .* must be above 0"),
        (-1e-4, r"alp.sigma_init: .* must be above 0"),
        (float("inf"), r"alp.sigma_init' is inf: Input should be a finite number"),
        (float("nan"), r"alp.sigma_init' is nan: Input should be a finite number"),
    ],
)
def test_a_sigma_that_has_no_logarithm_is_refused(value, words):
    with pytest.raises(ConfigError, match=words):
        configured({"sigma_init": value})


@pytest.mark.parametrize(
    ("preset", "values"),
    [
        ("paper", (1e-4, 5e-4, 0.01, None)),
        ("multi_turn", (1e-8, 1e-2, 0.01, "sequence")),
        ("short_run", (1e-3, 1e-2, 0.0, None)),
    ],
)
def test_a_preset_fills_the_keys_that_are_not_given(preset, values):
    alp = configured({"preset": preset}).alp
    assert (alp.sigma_init, alp.lr, alp.weight_decay, alp.level) == values
    own = configured({"preset": preset, "lr": 0.5, "level": "token"}).alp
    assert (own.sigma_init, own.lr, own.level) == (values[0], 0.5, "token")
    assert make_config({"model": {"path": "x"}, "alp": alp.model_dump(mode="json")}).alp == alp
    with pytest.raises(ConfigError, match=r"alp.preset.*'papers'"):
        configured({"preset": "papers"})


@pytest.mark.parametrize(
    ("alp", "words"),
    [
        (
            {"preset": "paper"},
            "from sigma 0.0001 (120 updates at alp.lr 0.0005 move it at most by a factor of about 1.06)",
        ),
        (
            {"preset": "short_run"},
            "from sigma 0.001 (120 updates at alp.lr 0.01 move it at most by a factor of about 3.32)",
        ),
        ({"preset": "short_run", "lr": 1e3}, "by a factor of more than 1e+06)"),
        ({"preset": "short_run", "learnable": False}, "from sigma 0.001; engines"),
    ],
)
def test_the_plan_says_how_far_sigma_can_move_in_the_run(qwen3, alp, words):
    config = configured(alp, model={"path": str(qwen3)}, run={"steps": 30})
    assert words in resolve_run(config).lines(config)[0]


@pytest.mark.parametrize("layers", [[2, 2], [3, 1], [-1, 2]])
def test_a_range_that_is_none_is_refused(layers):
    with pytest.raises(ConfigError, match=r"alp.layers.*\[start, end\)"):
        configured({"layers": layers})


def test_layers_outside_the_model_are_refused():
    with pytest.raises(ConfigError, match=r"alp.layers is \[2, 5\), but the model has layers 0 to 3: end at 4"):
        layer_noise(configured({"layers": [2, 5]}).alp, 4)
    noise = layer_noise(configured({"layers": [2, 4]}).alp, 4)
    assert [noise.perturbs(layer) for layer in range(4)] == [False, False, True, True]


def test_noise_on_the_logits_leaves_every_layer_alone():
    noise = layer_noise(configured({"layers": "logits"}).alp, 4)
    assert noise.logits and not any(noise.perturbs(layer) for layer in range(4))
    with pytest.raises(ConfigError, match=r"alp\.layers"):
        configured({"layers": "none"})


def test_layers_outside_the_model_are_refused_before_anything_starts(qwen3):
    with pytest.raises(ConfigError, match=r"alp\.layers"):
        check(configured({"layers": [0, 9]}, model={"path": str(qwen3)}))


@pytest.mark.parametrize("name", WITHOUT_RATIO)
def test_an_objective_without_a_ratio_is_refused_and_told_why(name):
    assert {"asympo", "scaled_po", "naive", "erpd_mse"} <= set(WITHOUT_RATIO)
    with pytest.raises(ConfigError, match=f"{name} uses no importance ratio.*numerator.*drpo"):
        objective_of(configured(objective={"name": name}))
    objective_of(configured({"enabled": False}, objective={"name": name}))


def test_a_teacher_without_a_ratio_is_refused_too():
    with pytest.raises(ConfigError, match=r"objective.teacher erpd_mse uses no importance ratio"):
        objective_of(configured(objective={"name": "erpd", "teacher": {"name": "erpd_mse"}}))
    teacher = {"name": "grpo", "ratio_denominator": "trainer_old"}
    assert objective_of(configured(objective={"name": "erpd", "teacher": teacher})).name == "erpd_distill"
    with pytest.raises(ConfigError, match=r"alp.level is set, but erpd has two objectives"):
        objective_of(configured({"level": "sequence"}, objective={"name": "erpd", "teacher": teacher}))


@pytest.mark.parametrize("name", ["ppo", "grpo", "dapo"])
@pytest.mark.parametrize(
    ("level", "clips"),
    [("token", (0.2, 0.28, 10.0)), ("sequence", (0.5, 3.0, 3.0))],
)
def test_a_level_brings_the_clips_of_the_paper(name, level, clips):
    made = objective_of(configured({"level": level}, objective={"name": name}))
    assert made.ratio_level == level
    assert (made.clip_low, made.clip_high, made.dual_clip) == clips


def test_clips_that_are_given_stay():
    made = objective_of(configured({"level": "sequence"}, objective={"name": "ppo", "clip_high": 0.4}))
    assert (made.clip_low, made.clip_high, made.dual_clip) == (0.2, 0.4, None)


@pytest.mark.parametrize("level", ["cumulative", "geometric"])
def test_a_level_without_clips_of_its_own_keeps_those_of_the_objective(level):
    made = objective_of(configured({"level": level}, objective={"name": "ppo"}))
    assert (made.ratio_level, made.clip_low, made.clip_high) == (level, 0.2, 0.2)


def test_two_levels_that_differ_are_refused():
    with pytest.raises(ConfigError, match=r"objective.ratio_level is 'geometric', but alp.level is 'sequence'"):
        objective_of(configured({"level": "sequence"}, objective={"name": "ppo", "ratio_level": "geometric"}))
    assert (
        objective_of(
            configured({"level": "sequence"}, objective={"name": "ppo", "ratio_level": "sequence"})
        ).ratio_level
        == "sequence"
    )


def test_a_level_that_the_objective_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="objective drpo: 'ratio_level' is 'sequence'"):
        objective_of(configured({"level": "sequence"}))
    assert objective_of(configured({"level": "token"})).name == "drpo"


def test_without_perturbation_the_objective_is_what_it_says_itself():
    made = objective_of(configured({"enabled": False, "level": "sequence"}, objective={"name": "ppo"}))
    assert (made.ratio_level, made.clip_high) == ("token", 0.2)
    assert layer_noise(configured({"enabled": False}).alp, 4) is None
