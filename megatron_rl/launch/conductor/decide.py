"""What the conductor does next: pure functions from what is known and what happened to actions and a verdict."""

from typing import FrozenSet, List, NamedTuple, Optional, Tuple

from megatron_rl.launch.conductor.slurm_states import FORGOTTEN, SILENT

TRAINER = "trainer"
KILL_AFTER = 10.0  # seconds from TERM to KILL of a role
GIVE_UP_AFTER = 30.0  # seconds from KILL until a role that still lives is left to Slurm
USER_ERROR, GAVE_UP, STOPPED = 2, 75, 130  # exit codes


class Rules(NamedTuple):
    """What stays the same during an attempt: roles, time limits in seconds, and when to try again."""

    engines: Tuple[str, ...] = ()
    preflight: bool = True
    start_timeout: float = 600.0
    margin: float = 600.0
    most_requeues: int = 20
    most_without_progress: int = 2
    requeue_on: Tuple[str, ...] = ("deadline", "preempted", "node_fail", "crash")
    least_engines: int = 0  # with which training goes on after others have ended; 0: it needs all
    most_restarts: int = 0  # of one engine, while training goes on without it
    nodes: Tuple[int, ...] = ()  # of each engine, numbered in its group
    spares: int = 0  # nodes that wait for engines whose own node does not start them again


class Attempt(NamedTuple):
    """What is known of the current attempt. Times are seconds; a time of 0 means: not yet."""

    phase: str = "new"  # new, preflight, engines, training, stopping, ending, over
    ready: FrozenSet[str] = frozenset()
    alive: FrozenSet[str] = frozenset()
    reason: str = ""  # why the trainer was told to stop
    asked: float = 0.0
    termed: bool = False
    ending: float = 0.0
    killed: bool = False
    start_by: float = 0.0
    deadline: float = 0.0
    first_bad: Optional[Tuple[str, int]] = None  # the role that ended badly first, and its exit code
    trainer_code: Optional[int] = None
    refused: Tuple[str, ...] = ()  # nodes that preflight refused
    restarts: Tuple[str, ...] = ()  # engines that were started again, one entry each time
    awaited: FrozenSet[Tuple[str, float]] = frozenset()  # of them, those not healthy yet, and until when
    moved: Tuple[int, ...] = ()  # nodes that were given up; the first spare node stands in for the first of them


class Event(NamedTuple):
    """Something that happened: start, preflight, ready, ended, signal, stop, deadline, tick."""

    kind: str
    role: str = ""
    code: int = 0
    text: str = ""
    nodes: Tuple[str, ...] = ()
    now: float = 0.0


class Action(NamedTuple):
    """Something to do: preflight, start, write_stop, term, kill, show, note, finish."""

    kind: str
    role: str = ""
    text: str = ""


Step = Tuple[Attempt, List[Action]]


def decide(rules: Rules, attempt: Attempt, event: Event) -> Step:
    """Return the attempt after an event, and what to do now. Nothing follows an attempt that is over."""
    if attempt.phase == "over":
        return attempt, []
    return _HANDLERS[event.kind](rules, attempt, event)


def _on_start(rules: Rules, attempt: Attempt, event: Event) -> Step:
    if rules.preflight:
        return attempt._replace(phase="preflight"), [Action("preflight")]
    return _start_engines(rules, attempt, event.now)


def _on_preflight(rules: Rules, attempt: Attempt, event: Event) -> Step:
    if attempt.phase != "preflight":
        return attempt, []
    if event.code:
        return attempt._replace(phase="over", refused=event.nodes), [Action("finish")]
    return _start_engines(rules, attempt, event.now)


def _start_engines(rules: Rules, attempt: Attempt, now: float) -> Step:
    if not rules.engines:
        return _start_trainer(attempt)
    attempt = attempt._replace(phase="engines", alive=frozenset(rules.engines), start_by=now + rules.start_timeout)
    return attempt, [Action("start", name) for name in rules.engines]


def _start_trainer(attempt: Attempt) -> Step:
    return attempt._replace(phase="training", alive=attempt.alive | {TRAINER}), [Action("start", TRAINER)]


def _on_ready(rules: Rules, attempt: Attempt, event: Event) -> Step:
    attempt = _stop_waiting(attempt._replace(ready=attempt.ready | {event.role}), event.role)
    if attempt.phase == "engines" and attempt.ready >= set(rules.engines):
        return _start_trainer(attempt)
    return attempt, []


def _on_ended(rules: Rules, attempt: Attempt, event: Event) -> Step:
    was_ready = event.role in attempt.ready
    attempt = attempt._replace(alive=attempt.alive - {event.role}, ready=attempt.ready - {event.role})
    attempt = _stop_waiting(attempt, event.role)
    if event.role == TRAINER:
        # A trainer that saved and stopped by itself, before the end of the allocation, says why in stopped.json.
        attempt = attempt._replace(trainer_code=event.code, reason=attempt.reason or event.text)
    if attempt.phase == "ending":
        return (attempt, []) if attempt.alive else _end_all(attempt, event.now)
    if event.role != TRAINER and attempt.phase == "stopping":
        return attempt, []  # the trainer still saves
    good = event.role == TRAINER and (event.code == 0 or attempt.reason)
    if good:
        return _end_all(attempt, event.now)
    left = len(attempt.alive & attempt.ready)
    if rules.least_engines and TRAINER in attempt.alive:
        if left >= rules.least_engines:
            return _go_on(rules, attempt, event, was_ready)
        text = "%d engines are left, at least %d are required" % (left, rules.least_engines)
        return _fail(attempt, event.role, event.code or 1, text, event.now)
    # An engine must not end while the trainer runs, so its exit code 0 is bad, too.
    return _fail(attempt, event.role, event.code or 1, "", event.now)


def _go_on(rules: Rules, attempt: Attempt, event: Event, was_ready: bool) -> Step:
    """Train without an engine, and start it again: on its node, or on a spare one if its node did not bring it back."""
    role, count = event.role, attempt.restarts.count(event.role)
    text = "training goes on with %d of %d engines" % (len(attempt.alive & attempt.ready), len(rules.engines))
    if count >= rules.most_restarts:
        return attempt, [Action("note", role, (text + ", after %d restarts of this one" % count) if count else text)]
    node = rules.nodes[rules.engines.index(role)]
    if count and not was_ready and node not in attempt.moved and len(attempt.moved) < rules.spares:
        attempt = attempt._replace(moved=attempt.moved + (node,))
    attempt = attempt._replace(
        alive=attempt.alive | {role},
        restarts=attempt.restarts + (role,),
        awaited=attempt.awaited | {(role, event.now + rules.start_timeout)},
    )
    text += "; it is started again (%d of %d)" % (count + 1, rules.most_restarts)
    return attempt, [Action("note", role, text), Action("start", role)]


def _stop_waiting(attempt: Attempt, role: str) -> Attempt:
    return attempt._replace(awaited=frozenset(one for one in attempt.awaited if one[0] != role))


def _fail(attempt: Attempt, role: str, code: int, text: str, now: float) -> Step:
    attempt, actions = _end_all(attempt._replace(first_bad=(role, code)), now)
    return attempt, [Action("show", role, text)] + actions


def _end_all(attempt: Attempt, now: float) -> Step:
    if not attempt.alive:
        return attempt._replace(phase="over"), [Action("finish")]
    attempt = attempt._replace(phase="ending", ending=now)
    return attempt, [Action("term", role) for role in sorted(attempt.alive)]


def _on_signal(rules: Rules, attempt: Attempt, event: Event) -> Step:
    again = event.text == "INT" and attempt.phase == "stopping"
    if again:
        return _end_all(attempt, event.now)
    reason = {"USR1": "deadline", "TERM": "preempted"}.get(event.text, "user")
    return _ask(attempt, reason, event.now)


def _on_stop(rules: Rules, attempt: Attempt, event: Event) -> Step:
    return _ask(attempt, event.text or "user", event.now)


def _ask(attempt: Attempt, reason: str, now: float) -> Step:
    """Ask the trainer to save and stop; without a trainer, end at once."""
    if attempt.phase == "training":
        attempt = attempt._replace(phase="stopping", reason=reason, asked=now)
        return attempt, [Action("write_stop", text=reason)]
    if attempt.phase in ("new", "preflight", "engines"):
        return _end_all(attempt._replace(reason=reason), now)
    return attempt, []


def _on_deadline(rules: Rules, attempt: Attempt, event: Event) -> Step:
    return attempt._replace(deadline=event.now), []


def _on_tick(rules: Rules, attempt: Attempt, event: Event) -> Step:
    now = event.now
    if attempt.phase == "ending":
        return _hurry(attempt, now)
    if attempt.phase == "stopping":
        late = now - attempt.asked - rules.margin / 2
        if late > GIVE_UP_AFTER:
            return _end_all(attempt, now)
        if late > 0 and not attempt.termed:
            return attempt._replace(termed=True), [Action("term", TRAINER)]
        return attempt, []
    if attempt.deadline and now > attempt.deadline - rules.margin:
        return _ask(attempt, "deadline", now)
    if attempt.phase == "engines" and now > attempt.start_by:
        late_one = next(name for name in rules.engines if name not in attempt.ready)
        return _fail(attempt, late_one, 1, "it was not healthy after %g s" % rules.start_timeout, now)
    overdue = frozenset(one for one in attempt.awaited if now > one[1])
    return attempt._replace(awaited=attempt.awaited - overdue), [Action("kill", role) for role, _ in sorted(overdue)]


def _hurry(attempt: Attempt, now: float) -> Step:
    waited = now - attempt.ending
    if waited > KILL_AFTER + GIVE_UP_AFTER:
        return attempt._replace(phase="over"), [Action("finish")]
    if waited > KILL_AFTER and not attempt.killed:
        return attempt._replace(killed=True), [Action("kill", role) for role in sorted(attempt.alive)]
    return attempt, []


_HANDLERS = {
    "start": _on_start,
    "preflight": _on_preflight,
    "ready": _on_ready,
    "ended": _on_ended,
    "signal": _on_signal,
    "stop": _on_stop,
    "deadline": _on_deadline,
    "tick": _on_tick,
}


class Facts(NamedTuple):
    """What an attempt has come to: the end of its roles, the files of the run, and Slurm's view of the job."""

    trainer_code: Optional[int] = None
    first_bad: Optional[Tuple[str, int]] = None
    reason: str = ""
    refused: Tuple[str, ...] = ()
    nodes: Tuple[str, ...] = ()
    done: bool = False
    stopped: bool = False  # this attempt has written stopped.json
    attempts: int = 1  # of this submission, with this one
    without_progress: int = 0  # attempts in a row that have made no new checkpoint, with this one
    state: str = "RUNNING"  # of the job
    cancelled: bool = False
    lost: Tuple[str, ...] = ()  # nodes that Slurm has lost
    failed_twice: Tuple[str, ...] = ()


class JobVerdict(NamedTuple):
    """What happens to the job: exit, requeue, resubmit without some nodes, or leave it to Slurm."""

    what: str
    code: int
    why: str
    exclude: Tuple[str, ...] = ()


def judge(rules: Rules, facts: Facts) -> JobVerdict:
    """Return what happens to the job after an attempt."""
    final = _judge_final(facts)
    if final is not None:
        return final
    kind, why = _kind_of_end(facts)
    code = facts.trainer_code if facts.trainer_code is not None and facts.trainer_code > 0 else 1
    if kind not in rules.requeue_on:
        return JobVerdict("exit", code, "%s; the profile does not requeue after that" % why)
    if facts.attempts > rules.most_requeues:
        return JobVerdict("exit", GAVE_UP, "%s; given up after %d attempts" % (why, facts.attempts))
    if kind != "preempted" and facts.without_progress >= rules.most_without_progress:
        n = facts.without_progress
        return JobVerdict("exit", GAVE_UP, "%s; given up after %d attempts without a new checkpoint" % (why, n))
    return _judge_by_state(facts, why)


def _judge_by_state(facts: Facts, why: str) -> JobVerdict:
    """Only a job that Slurm still calls running is requeued: a requeue would resurrect one that was cancelled."""
    if facts.state == "PREEMPTED":
        return JobVerdict("leave", GAVE_UP, "%s; Slurm requeues the job" % why)
    if facts.state == SILENT:
        return JobVerdict("leave", GAVE_UP, "%s; not requeued, because Slurm does not tell the state of the job" % why)
    if facts.state == FORGOTTEN:
        return JobVerdict("leave", STOPPED, "%s; not requeued, because for Slurm the job is over" % why)
    if facts.state != "RUNNING":
        return JobVerdict("leave", STOPPED, "%s; left to Slurm, for which the job is %s" % (why, facts.state))
    exclude = tuple(sorted(set(facts.refused) | set(facts.failed_twice)))
    if exclude:
        return JobVerdict("resubmit", GAVE_UP, "%s; tried again without %s" % (why, ", ".join(exclude)), exclude)
    return JobVerdict("requeue", GAVE_UP, "%s; tried again" % why)


def _judge_final(facts: Facts) -> Optional[JobVerdict]:
    """Return the verdict of an end after which nothing is tried again; None for others."""
    if facts.done:
        return JobVerdict("exit", 0, "the run is done")
    if facts.cancelled:
        return JobVerdict("exit", STOPPED, "the run was cancelled")
    if facts.refused and set(facts.refused) >= set(facts.nodes):
        return JobVerdict("exit", USER_ERROR, "preflight refused every node")
    mistake = TRAINER if facts.trainer_code == USER_ERROR else ""
    if facts.first_bad is not None and facts.first_bad[1] == USER_ERROR:
        mistake = facts.first_bad[0]
    if mistake:
        return JobVerdict("exit", USER_ERROR, "%s ended with an error that only you can mend" % mistake)
    if facts.reason in ("user", "cancel"):
        return JobVerdict("exit", STOPPED, "stopped on request")
    if facts.trainer_code == 0 and not facts.stopped and facts.first_bad is None:
        return JobVerdict("exit", 1, "the trainer ended without a result: it has written no done.json")
    return None


def _kind_of_end(facts: Facts) -> Tuple[str, str]:
    """Return the kind of an end (deadline, preempted, node_fail, crash) and the words for it."""
    if facts.refused:
        return "node_fail", "preflight refused %s" % ", ".join(facts.refused)
    if facts.reason:
        saved = "stopped and saved" if facts.stopped else "stopped without saving"
        return facts.reason, "%s (%s)" % (saved, facts.reason)
    if facts.lost:
        return "node_fail", "Slurm lost %s" % ", ".join(facts.lost)
    if facts.first_bad is None:
        return "crash", "the attempt ended early"
    role, code = facts.first_bad
    return "crash", "%s ended with %s" % (role, describe_code(code))


def describe_code(code: int) -> str:
    """Return an exit code in words; 128 + n is signal n."""
    names = {134: "SIGABRT", 137: "SIGKILL: out of memory, or killed", 139: "SIGSEGV", 143: "SIGTERM"}
    return "exit code %d%s" % (code, " (%s)" % names[code] if code in names else "")
