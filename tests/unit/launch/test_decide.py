"""The conductor's decisions, one test for each row of the table in docs/slurm.md. No process and no Slurm."""

import pytest

from megatron_rl.launch.conductor.decide import Attempt, Event, Facts, JobVerdict, Rules, decide, judge

RULES = Rules(engines=("engine-0", "engine-1"), start_timeout=60, margin=100)


def play(*events: Event, rules: Rules = RULES) -> tuple[Attempt, list[str]]:
    """Return the attempt after these events, and the actions as words."""
    attempt, said = Attempt(), []
    for event in events:
        attempt, actions = decide(rules, attempt, event)
        said += [" ".join(filter(None, (action.kind, action.role, action.text))) for action in actions]
    return attempt, said


START = (Event("start"), Event("preflight"))
RUNNING = (*START, Event("ready", "engine-0"), Event("ready", "engine-1"))
STARTED = ["preflight", "start engine-0", "start engine-1", "start trainer"]
END_ALL = ["term engine-0", "term engine-1"]


def after_start(*events: Event) -> tuple[Attempt, list[str]]:
    """Return the attempt after these events of a running job, and the actions since its start."""
    attempt, said = play(*RUNNING, *events)
    assert said[:4] == STARTED
    return attempt, said[4:]


def test_the_trainer_starts_only_when_every_engine_is_healthy() -> None:
    assert play(*START, Event("ready", "engine-1"))[1] == STARTED[:3]
    assert play(*RUNNING)[1] == STARTED


def test_without_engines_and_preflight_the_trainer_starts_at_once() -> None:
    assert play(Event("start"), rules=Rules(preflight=False))[1] == ["start trainer"]


def test_a_refused_node_ends_the_attempt_before_any_role() -> None:
    attempt, said = play(Event("start"), Event("preflight", code=1, nodes=("node3",)))
    assert said == ["preflight", "finish"] and attempt.refused == ("node3",)


def test_an_engine_that_does_not_become_healthy_ends_the_attempt() -> None:
    quiet = (*START, Event("ready", "engine-0"), Event("tick", now=59))
    assert play(*quiet)[1] == STARTED[:3]
    attempt, said = play(*quiet, Event("tick", now=61))
    assert said[3:] == ["show engine-1 it was not healthy after 60 s", *END_ALL]
    assert attempt.first_bad == ("engine-1", 1)


@pytest.mark.parametrize("code", [0, 1, 137])
def test_an_engine_that_ends_ends_the_others(code: int) -> None:
    attempt, said = after_start(Event("ended", "engine-1", code))
    assert said == ["show engine-1", "term engine-0", "term trainer"]
    assert attempt.first_bad == ("engine-1", code or 1)


def test_training_may_go_on_without_an_engine_down_to_the_fewest() -> None:
    rules = RULES._replace(least_engines=1)
    one = (*RUNNING, Event("ended", "engine-1", 137))
    attempt, said = play(*one, rules=rules)
    assert said[4:] == ["note engine-1 training goes on with 1 of 2 engines"] and attempt.first_bad is None
    attempt, said = play(*one, Event("ended", "engine-0", 1), rules=rules)
    assert said[5:] == ["show engine-0 0 engines are left, at least 1 are required", "term trainer"]
    assert attempt.first_bad == ("engine-0", 1)
    attempt, said = play(*one, Event("ended", "trainer", 0), Event("ended", "engine-0", 143), rules=rules)
    assert said[5:] == ["term engine-0", "finish"] and attempt.first_bad is None
    two = RULES._replace(least_engines=2)
    assert play(*one, rules=two)[1][4:] == [
        "show engine-1 1 engines are left, at least 2 are required",
        "term engine-0",
        "term trainer",
    ]
    early = play(*START, Event("ended", "engine-0", 1), rules=rules)[1]  # no trainer runs yet
    assert early[3:] == ["show engine-0", "term engine-1"]


AGAIN = RULES._replace(least_engines=1, most_restarts=2, nodes=(2, 3), spares=1)
LOST = "note engine-1 training goes on with 1 of 2 engines"


def after_loss(*events: Event, rules: Rules = AGAIN) -> tuple[Attempt, list[str]]:
    """Return the attempt after the end of engine-1 and these events, and the actions since it was started again."""
    attempt, said = play(*RUNNING, Event("ended", "engine-1", 137, now=100), *events, rules=rules)
    assert said[4:6] == [LOST + "; it is started again (1 of 2)", "start engine-1"]
    return attempt, said[6:]


END = Event("ended", "engine-1", 1, now=101)


def test_an_engine_that_is_lost_is_started_again_on_its_node() -> None:
    attempt, said = after_loss()
    assert attempt.moved == () and "engine-1" in attempt.alive and "engine-1" not in attempt.ready and said == []
    attempt, said = after_loss(Event("ready", "engine-1"), Event("tick", now=1000))
    assert said == [] and attempt.ready == {"engine-0", "engine-1"}
    attempt, said = after_loss(Event("ready", "engine-1"), END)  # it worked there, so it stays
    assert said == [LOST + "; it is started again (2 of 2)", "start engine-1"] and attempt.moved == ()


def test_an_engine_that_its_node_does_not_start_again_moves_to_a_spare_node() -> None:
    attempt, said = after_loss(END)
    assert said == [LOST + "; it is started again (2 of 2)", "start engine-1"] and attempt.moved == (3,)
    assert after_loss(END, rules=AGAIN._replace(spares=0))[0].moved == ()


def test_engines_of_a_lost_node_share_one_spare_node() -> None:
    rules = AGAIN._replace(engines=("engine-0", "engine-1", "engine-2"), nodes=(2, 3, 3), spares=2)
    both = [Event("ended", name, 137) for name in ("engine-1", "engine-2", "engine-1", "engine-2")]
    attempt, _ = play(*RUNNING, Event("ready", "engine-2"), *both, rules=rules)
    assert attempt.moved == (3,) and attempt.restarts == ("engine-1", "engine-2", "engine-1", "engine-2")


def test_an_engine_that_ends_too_often_is_not_started_again() -> None:
    attempt, said = after_loss(END, Event("ready", "engine-1"), END)
    assert said[2:] == [LOST + ", after 2 restarts of this one"] and "engine-1" not in attempt.alive
    assert attempt.first_bad is None and attempt.phase == "training"


def test_an_engine_that_is_not_healthy_again_in_time_is_killed_and_started_again() -> None:
    assert after_loss(Event("tick", now=159))[1] == []
    ticks = (Event("tick", now=161), Event("tick", now=162))
    assert after_loss(*ticks)[1] == ["kill engine-1"]
    assert after_loss(*ticks, END)[1][1:] == [LOST + "; it is started again (2 of 2)", "start engine-1"]


def test_an_engine_that_is_on_its_way_back_does_not_count_as_left() -> None:
    attempt, said = after_loss(Event("ended", "engine-0", 1))
    assert said[0] == "show engine-0 0 engines are left, at least 1 are required"
    assert said[1:] == ["term engine-1", "term trainer"] and attempt.first_bad == ("engine-0", 1)


def test_no_engine_is_started_again_while_the_trainer_stops() -> None:
    said = play(*RUNNING, Event("signal", text="USR1"), Event("ended", "engine-1", 1), rules=AGAIN)[1]
    assert said[4:] == ["write_stop deadline"]


def test_an_engine_that_ends_before_the_trainer_starts_ends_the_others() -> None:
    assert play(*START, Event("ended", "engine-0", 1))[1][3:] == ["show engine-0", "term engine-1"]


def test_a_trainer_that_fails_is_shown_and_ends_the_engines() -> None:
    attempt, said = after_start(Event("ended", "trainer", 1))
    assert said == ["show trainer", *END_ALL] and attempt.first_bad == ("trainer", 1)


def test_a_trainer_that_is_done_ends_the_engines_and_the_attempt() -> None:
    ends = (Event("ended", "engine-0", 143), Event("ended", "engine-1", 143))
    attempt, said = after_start(Event("ended", "trainer", 0), *ends)
    assert said == [*END_ALL, "finish"] and attempt.first_bad is None and attempt.phase == "over"


def test_only_the_first_role_that_fails_is_the_cause() -> None:
    attempt, said = after_start(Event("ended", "trainer", 1), Event("ended", "engine-0", 1))
    assert attempt.first_bad == ("trainer", 1) and [word for word in said if "show" in word] == ["show trainer"]


def test_roles_that_do_not_end_are_killed_and_at_last_left_to_slurm() -> None:
    end = Event("ended", "trainer", 1, now=100)
    assert after_start(end, Event("tick", now=109))[1][3:] == []
    assert after_start(end, Event("tick", now=111))[1][3:] == ["kill engine-0", "kill engine-1"]
    attempt, said = after_start(end, Event("tick", now=111), Event("tick", now=112), Event("tick", now=141))
    assert said[5:] == ["finish"] and attempt.alive == {"engine-0", "engine-1"}


@pytest.mark.parametrize(("signal", "reason"), [("USR1", "deadline"), ("TERM", "preempted"), ("INT", "user")])
def test_a_signal_asks_the_trainer_to_save_and_kills_nothing(signal: str, reason: str) -> None:
    attempt, said = after_start(Event("signal", text=signal))
    assert said == [f"write_stop {reason}"] and attempt.reason == reason and len(attempt.alive) == 3


def test_a_stop_file_asks_the_trainer_with_its_reason() -> None:
    assert after_start(Event("stop", text="cancel"))[1] == ["write_stop cancel"]


def test_the_end_of_the_allocation_asks_the_trainer_a_margin_before() -> None:
    known = Event("deadline", now=1000)
    assert after_start(known, Event("tick", now=899))[1] == []
    assert after_start(known, Event("tick", now=901))[1] == ["write_stop deadline"]
    assert after_start(known, Event("deadline", now=2000), Event("tick", now=901))[1] == []  # an admin extended it


def test_a_trainer_that_does_not_stop_gets_term_and_then_all_end() -> None:
    ask = Event("signal", text="USR1", now=1000)
    assert after_start(ask, Event("tick", now=1049))[1][1:] == []
    assert after_start(ask, Event("tick", now=1051), Event("tick", now=1052))[1][1:] == ["term trainer"]
    assert after_start(ask, Event("tick", now=1051), Event("tick", now=1081))[1][2:] == [*END_ALL, "term trainer"]


def test_engines_that_end_with_the_signal_do_not_disturb_the_save() -> None:
    events = (Event("signal", text="TERM"), Event("ended", "engine-0", 143), Event("ended", "engine-1", 143))
    assert after_start(*events)[1] == ["write_stop preempted"]
    attempt, said = after_start(*events, Event("ended", "trainer", 130))
    assert said[1:] == ["finish"] and attempt.first_bad is None


def test_a_trainer_that_stopped_by_itself_before_the_end_has_not_failed() -> None:
    attempt, said = after_start(Event("ended", "trainer", 130, "deadline"))
    assert said == END_ALL and attempt.first_bad is None and attempt.reason == "deadline"


def test_a_stop_before_the_trainer_started_ends_what_runs() -> None:
    attempt, said = play(*START, Event("signal", text="USR1"))
    assert said[3:] == END_ALL and attempt.reason == "deadline"
    assert play(Event("start"), Event("signal", text="TERM"))[1] == ["preflight", "finish"]


def test_a_second_interrupt_ends_all_at_once() -> None:
    said = after_start(Event("signal", text="INT"), Event("signal", text="INT"))[1]
    assert said == ["write_stop user", *END_ALL, "term trainer"]


def test_nothing_follows_an_attempt_that_is_over() -> None:
    attempt, _ = play(Event("start"), Event("preflight", code=1, nodes=("n",)))
    for kind in ("tick", "ended", "signal", "stop", "ready", "preflight", "start", "deadline"):
        assert decide(RULES, attempt, Event(kind, "trainer")) == (attempt, [])


CRASH = Facts(trainer_code=1, first_bad=("trainer", 1), nodes=("n1", "n2"))
SAVED = Facts(trainer_code=130, reason="deadline", stopped=True, nodes=("n1", "n2"))
VERDICTS = {
    "done": (Facts(trainer_code=0, done=True), "exit", 0),
    "done, although a rank then died": (CRASH._replace(done=True), "exit", 0),
    "done, although it was cancelled": (Facts(trainer_code=0, done=True, cancelled=True), "exit", 0),
    "ended without a result": (Facts(trainer_code=0), "exit", 1),
    "saved before the deadline": (SAVED, "requeue", 75),
    "saved, and srun killed rank 0 late": (SAVED._replace(trainer_code=143), "requeue", 75),
    "preempted while Slurm still says RUNNING": (SAVED._replace(reason="preempted"), "requeue", 75),
    "preempted, Slurm requeues": (SAVED._replace(reason="preempted", state="PREEMPTED"), "leave", 75),
    "stopped by cancel --save": (SAVED._replace(reason="cancel"), "exit", 130),
    "interrupted": (SAVED._replace(reason="user"), "exit", 130),
    "cancelled": (CRASH._replace(cancelled=True), "exit", 130),
    "scancel": (SAVED._replace(reason="preempted", state="CANCELLED"), "leave", 130),
    "scancel, completing": (CRASH._replace(state="COMPLETING"), "leave", 130),
    "time limit": (SAVED._replace(reason="preempted", stopped=False, state="TIMEOUT"), "leave", 130),
    "Slurm does not respond": (CRASH._replace(state="SILENT"), "leave", 75),
    "Slurm has forgotten the job": (CRASH._replace(state="FORGOTTEN"), "leave", 130),
    "the user's error": (CRASH._replace(trainer_code=2, first_bad=("trainer", 2)), "exit", 2),
    "the user's error in an engine": (CRASH._replace(trainer_code=143, first_bad=("engine-0", 2)), "exit", 2),
    "may go away": (CRASH._replace(trainer_code=75, first_bad=("trainer", 75)), "requeue", 75),
    "crash": (CRASH, "requeue", 75),
    "killed": (CRASH._replace(trainer_code=137, first_bad=("trainer", 137)), "requeue", 75),
    "a lost node": (CRASH._replace(lost=("n2",)), "requeue", 75),
    "too many attempts": (CRASH._replace(attempts=21), "exit", 75),
    "the last attempt that is tried again": (CRASH._replace(attempts=20), "requeue", 75),
    "crashes without progress": (CRASH._replace(without_progress=2), "exit", 75),
    "deadlines without progress": (SAVED._replace(without_progress=2), "exit", 75),
    "one crash without progress": (CRASH._replace(without_progress=1), "requeue", 75),
    "preempted often without progress": (SAVED._replace(reason="preempted", without_progress=5), "requeue", 75),
    "one node refused": (Facts(refused=("n2",), nodes=("n1", "n2")), "resubmit", 75),
    "every node refused": (Facts(refused=("n1", "n2"), nodes=("n1", "n2")), "exit", 2),
    "a node that failed twice": (CRASH._replace(failed_twice=("n2",)), "resubmit", 75),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_the_verdict_of_an_attempt(name: str) -> None:
    facts, what, code = VERDICTS[name]
    verdict = judge(RULES, facts)
    assert (verdict.what, verdict.code) == (what, code), verdict.why


def test_a_bad_node_is_excluded() -> None:
    assert judge(RULES, Facts(refused=("n2",), nodes=("n1", "n2"))).exclude == ("n2",)
    assert judge(RULES, CRASH._replace(failed_twice=("n2",))).exclude == ("n2",)


@pytest.mark.parametrize(("reason", "code"), [("deadline", 130), ("preempted", 130)])
def test_a_profile_may_refuse_to_try_again(reason: str, code: int) -> None:
    verdict = judge(RULES._replace(requeue_on=("crash",)), SAVED._replace(reason=reason))
    assert (verdict.what, verdict.code) == ("exit", code) and "does not requeue" in verdict.why


def test_the_words_name_what_happened() -> None:
    assert judge(RULES, CRASH._replace(trainer_code=137, first_bad=("engine-1", 137))).why == (
        "engine-1 ended with exit code 137 (SIGKILL: out of memory, or killed); tried again"
    )
    assert judge(RULES, CRASH._replace(attempts=21)).why == "trainer ended with exit code 1; given up after 21 attempts"
    assert isinstance(judge(RULES, SAVED), JobVerdict)
