"""An ERPD plan has the stated defaults, and an illegal plan is refused with an error that names the key."""

import pytest

from megatron_rl.config import make_config
from megatron_rl.errors import ConfigError
from megatron_rl.plan import plan_algorithm
from megatron_rl.plan.erpd_plan import make_plan

TEACHER = {"name": "erpd_mse"}


def plan(**keys):
    return make_plan({"name": "erpd", "teacher": TEACHER, **keys})


def test_a_teacher_is_all_a_plan_needs():
    made = plan()
    assert (made.teacher_updates, made.kept, made.save_every, made.student_updates) == (50, (10, 20, 30), 10, 16)
    assert [(s.teacher, s.denominator, s.updates) for s in made.signals] == [("last", "unlearned@10", 16)]
    assert made.student_objective().needs == {"logold"}


def test_only_a_teacher_of_outcome_regression_is_measured_against_itself_by_default():
    assert plan(keep=[5, 20]).signals[0].unlearned == 5
    assert plan(signals=[{}]).signals[0].denominator == "old"
    for name in ("erpd_ce", "sapo"):
        assert [s.denominator for s in plan(teacher={"name": name}).signals] == ["old"]


@pytest.mark.parametrize("name", ["sapo", "grpo", "ppo", "dapo", "gspo", "cispo", "drpo"])
def test_a_ratio_teacher_compares_to_the_trainer_s_own_old_policy_unless_told_otherwise(name):
    objective = plan(teacher={"name": name}).teacher_objective()
    assert (
        objective.ratio_denominator == "trainer_old" and "logmu" not in objective.needs and "logold" in objective.needs
    )


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl", "dppo_topk", "minirl"])
def test_objectives_that_always_weigh_by_the_engine_s_policy_cannot_be_teachers(name):
    with pytest.raises(
        ConfigError, match=f"{name} cannot be a teacher: .*take one of .*erpd_ce, erpd_mse.*sapo"
    ) as refusal:
        plan(teacher={"name": name})
    offered = str(refusal.value).rpartition("take one of ")[2].split(", ")
    assert name not in offered and all(plan(teacher={"name": other}).teacher_updates for other in offered)


def test_the_default_checkpoints_are_those_the_teacher_reaches():
    assert plan(teacher_updates=25).kept == (10, 20)


def test_signals_follow_one_another():
    made = plan(signals=[{"updates": 2}, {"denominator": "unlearned@10", "updates": 3}], teacher_updates=40)
    assert [made.signals.index(made.signal_of(update)) for update in range(5)] == [0, 0, 1, 1, 1]
    assert made.student_updates == 5 and made.signals[1].unlearned == 10 and made.teacher_at(made.signals[0]) == 40
    with pytest.raises(IndexError):
        made.signal_of(5)


def test_older_students_are_named_by_steps_of_the_run():
    made = plan(signals=[{"denominator": "student@3"}, {"denominator": "student@0"}, {}])
    assert made.older_students == (0, 3)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"teacher_update": 3}, ["objective.teacher_update'", "did you mean 'teacher_updates'"]),
        ({"signals": [{"denomnator": "old"}]}, ["objective.signals.0.denomnator", "did you mean 'denominator'"]),
        ({"signals": [{"denominator": "unlearnt@10"}]}, ["objective.signals.0.denominator", "unlearned@k"]),
        ({"signals": [{"denominator": "unlearned@7"}]}, ["signals.0.denominator", "after 7 updates", "add 7 to keep"]),
        ({"signals": [{"denominator": "unlearned@0"}]}, ["signals.0.denominator", "at least 1"]),
        ({"signals": [{"teacher": 0}]}, ["signals.0.teacher", "at least 1 update"]),
        ({"signals": [{"teacher": -3}]}, ["signals.0.teacher", "at least 1 update"]),
        ({"teacher_updates": 5}, ["keep = ()", "erpd_mse", "last update 5", "signals"]),
        ({"teacher_updates": 10}, ["keep = (10,)", "names none before"]),
        ({"signals": [{"teacher": 7}]}, ["signals.0.teacher", "after 7 updates"]),
        ({"signals": []}, ["objective.signals"]),
        ({"keep": [60]}, ["keep names update 60", "1 to 50"]),
        ({"teacher_updates": 0}, ["objective.teacher_updates", "0"]),
        ({"floor": 1.0}, ["objective.floor"]),
        ({"outliers": "negative"}, ["objective.outliers", "negative_on_positives"]),
        ({"teacher": {}}, ["objective.teacher", "no name"]),
        ({"teacher": {"name": "erpd_msw"}}, ["erpd_mse"]),
        ({"teacher": {"name": "erpd_distill"}}, ["cannot be a teacher"]),
        (
            {"teacher": {"name": "grpo", "ratio_denominator": "rollout"}},
            ["'logmu'", "set ratio_denominator: trainer_old"],
        ),
        ({"student": {"clip_hihg": 0.3}}, ["clip_high"]),
        ({"student": {"ratio_denominator": "rollout"}}, ["objective.student", "'logmu'"]),
        ({"student": {"name": "grpo"}}, ["objective.student"]),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_by_key(keys, words):
    with pytest.raises(ConfigError) as refusal:
        plan(**keys)
    for word in words:
        assert word in str(refusal.value)


def test_a_plan_without_a_teacher_is_refused():
    with pytest.raises(ConfigError, match=r"objective\.teacher' is missing"):
        make_plan({"name": "erpd"})


def test_a_run_of_rounds_asks_the_engines_for_no_log_probabilities():
    config = make_config({"model": {"path": "m"}, "objective": {"name": "erpd", "teacher": TEACHER}})
    assert plan_algorithm(config).erpd.teacher == TEACHER
    assert "logmu" not in plan_algorithm(config).objective.needs


def test_other_objectives_have_no_plan():
    config = make_config({"model": {"path": "m"}, "objective": {"name": "drpo"}})
    assert plan_algorithm(config).erpd is None and plan_algorithm(config).objective.name == "drpo"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"teacher_lr": float("inf")}, "'objective.teacher_lr' is inf"),
        ({"floor": float("-inf")}, "'objective.floor' is -inf"),
        ({"teacher_updates": 10**12}, r"objective\.teacher_updates: it is 1e\+12"),
        ({"teacher_updates": True}, r"objective\.teacher_updates: it is true, not a number"),
    ],
)
def test_the_limits_of_all_keys_hold_for_a_round(keys, message):
    with pytest.raises(ConfigError, match=message):
        make_plan({"name": "erpd", "teacher": {"name": "erpd_mse"}, **keys})
