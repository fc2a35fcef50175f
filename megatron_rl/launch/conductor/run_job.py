"""The program of a job: attempts until there is a verdict, then exit, requeue or resubmit."""

import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from megatron_rl.launch.conductor.control_files import newest_checkpoint, read_json, write_json
from megatron_rl.launch.conductor.decide import GAVE_UP, STOPPED, USER_ERROR, Facts, JobVerdict, Rules, judge
from megatron_rl.launch.conductor.nodelist import expand_hosts
from megatron_rl.launch.conductor.probe import run_probe
from megatron_rl.launch.conductor.run_attempt import BEAT_S, AttemptRunner, JobHosts, say
from megatron_rl.launch.conductor.run_files import RunFiles
from megatron_rl.launch.conductor.run_preflight import Preflight, run_bandwidth
from megatron_rl.launch.conductor.run_task import run_task
from megatron_rl.launch.conductor.slurm_commands import (
    job_key,
    job_state,
    lost_nodes,
    requeue_job,
    resubmit_job,
    state_at_end,
)
from megatron_rl.launch.conductor.slurm_states import SILENT

_WAIT_FOR_REQUEUE_S = 300
_FRESH_S = 60  # a conductor gives a sign of life every 10 s


def run_conductor(arguments: Sequence[str]) -> int:
    """Run `job.json`, or with `probe SPEC` print the facts of this node. Return the exit code."""
    if arguments[0] == "probe":
        run_probe(arguments[1])
        return 0
    if arguments[0] == "task":
        return run_task(arguments[1], arguments[2], arguments[3:])
    if arguments[0] == "preflight":
        return _only_preflight(_read_job(arguments[1], os.environ))
    signals: List[str] = []
    _note_signals(signals)
    _raise_open_files()
    job = _read_job(arguments[0], os.environ)
    place = JobHosts(job_key(os.environ), _groups(job, os.environ)) if job["mode"] != "local" else _this_machine()
    while True:
        code = _run_once(job, place, signals)
        if code is not None:
            return code


def _only_preflight(job: Mapping[str, Any]) -> int:
    """Look at the nodes of this allocation, and measure bandwidth if asked to. Return 0 if none is refused."""
    files = RunFiles(job["run"], job["submission"])
    os.makedirs(files.logs, exist_ok=True)
    refused = Preflight(job, _groups(job, os.environ), files, say).run()
    if refused or not job["bandwidth"]:
        return 1 if refused else 0
    return run_bandwidth(job, files, say)


def _note_signals(signals: List[str]) -> None:
    """Let handlers only note a signal: the loop handles it, and a second signal cannot interrupt that."""
    for name in ("USR1", "TERM", "INT"):
        signal.signal(getattr(signal, "SIG" + name), lambda number, _: signals.append(signal.Signals(number).name[3:]))


def _raise_open_files() -> None:
    """Allow steps as many open files as the system does; srun passes the limit on."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _read_job(path: str, env: Mapping[str, str]) -> Dict[str, Any]:
    with open(path) as file:
        job = dict(json.load(file))
    if "tasks" in job:  # an array: every task has a job of its own
        return _read_job(job["tasks"][int(env["SLURM_ARRAY_TASK_ID"])], env)
    return job


def _this_machine() -> JobHosts:
    return JobHosts("", ((socket.gethostname(),),))


def _groups(job: Mapping[str, Any], env: Mapping[str, str]) -> Tuple[Tuple[str, ...], ...]:
    """Return the hosts of each group of nodes."""
    if job["mode"] == "het":
        names = ["SLURM_JOB_NODELIST_HET_GROUP_%d" % number for number in range(len(job["groups"]))]
    else:
        names = ["SLURM_JOB_NODELIST"]
    return tuple(tuple(expand_hosts(env[name])) for name in names)


def _run_once(job: Mapping[str, Any], place: JobHosts, signals: List[str]) -> Optional[int]:
    """Run one attempt. Return the exit code of the job; None: another attempt follows in this process."""
    files = RunFiles(job["run"], job["submission"])
    early = _other_job(files, place) or _before_start(job, files)
    if early is not None:
        return _exit(files, early, place)
    files.begin(
        {"job": place.key, "nodes": list(place.hosts), "versions": job["versions"]}, newest_checkpoint(job["run"])
    )
    say("attempt %d of %s, job %s on %s" % (files.number, job["run"], place.key or "local", ", ".join(place.hosts)))
    runner = AttemptRunner(job, place, files, signals)
    try:
        runner.run()
    except OSError as error:  # a host without an address, a folder that went away
        say("the attempt cannot run: %s" % error)
        runner.give_up()
    del signals[:]  # of this attempt
    with _beating(runner):
        return _after_end(job, place, files, runner, signals)


@contextmanager
def _beating(runner: AttemptRunner) -> Iterator[None]:
    """Let a thread write that this conductor works. Between attempts it may wait for Slurm for a long time."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_S):
            try:
                runner.beat()
            except OSError as error:  # the next one may succeed
                say("the sign of life cannot be written: %s" % error)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _before_start(job: Mapping[str, Any], files: RunFiles) -> Optional[JobVerdict]:
    """Return the verdict of an attempt that must not start, because Slurm also requeues by itself; None: start."""
    if read_json(files.control("done.json")) is not None:
        return JobVerdict("exit", 0, "the run is done already")
    if os.path.exists(files.control("cancel")):
        return JobVerdict("exit", STOPPED, "the run was cancelled")
    most = job["rules"]["most_requeues"] + 1
    if files.attempts > most:
        return JobVerdict("exit", GAVE_UP, "given up after %d attempts" % (files.attempts - 1))
    return None


def _other_job(files: RunFiles, place: JobHosts) -> Optional[JobVerdict]:
    """Return a refusal if another job works in this run folder, such as one that was started by hand; else None."""
    beat = read_json(files.control("conductor")) or {}
    other = beat.get("job", "")
    if not place.key or other in ("", place.key) or time.time() - beat["time"] > _FRESH_S:
        return None
    if job_state(other) not in ("RUNNING", SILENT):
        return None
    return JobVerdict("leave", USER_ERROR, "job %s works in %s: this one starts nothing" % (other, files.run))


def _after_end(
    job: Mapping[str, Any], place: JobHosts, files: RunFiles, runner: AttemptRunner, signals: List[str]
) -> Optional[int]:
    state = runner.state
    checkpoint = newest_checkpoint(job["run"])
    stopped = read_json(files.control("stopped.json"))
    suspects = runner.suspects()
    facts = Facts(
        trainer_code=state.trainer_code,
        first_bad=state.first_bad,
        reason=state.reason,
        refused=state.refused,
        nodes=place.hosts,
        done=read_json(files.control("done.json")) is not None,
        stopped=stopped is not None and stopped.get("attempt", files.number) == files.number,
        attempts=files.attempts,
        without_progress=files.without_progress(checkpoint),
        state=state_at_end(place.key, lambda: "TERM" in signals) if place.key else "RUNNING",
        cancelled=os.path.exists(files.control("cancel")),
        lost=tuple(lost_nodes(place.hosts)) if place.key and state.first_bad is not None else (),
        failed_twice=files.failed_before(suspects),
    )
    verdict = judge(Rules(**job["rules"]), facts)
    files.finish(
        {
            "code": verdict.code if verdict.what == "exit" else state.trainer_code,
            "why": verdict.why,
            "verdict": verdict.what,
            "newest": checkpoint,
            "lost": list(facts.lost),
            "suspects": list(suspects),
        }
    )
    return _carry_out(job, place, files, verdict, signals)


def _await_end(signals: List[str]) -> None:
    """Wait until Slurm ends this job to requeue it: an exit before that would be the end of the job."""
    deadline = time.monotonic() + _WAIT_FOR_REQUEUE_S
    while "TERM" not in signals and time.monotonic() < deadline:
        time.sleep(0.1)


def _carry_out(
    job: Mapping[str, Any], place: JobHosts, files: RunFiles, verdict: JobVerdict, signals: List[str]
) -> Optional[int]:
    if verdict.what in ("exit", "leave"):
        return _exit(files, verdict, place)
    say(verdict.why)
    if not place.key:
        return None
    if verdict.what == "requeue":
        reply = requeue_job(place.key)
        if reply.code == 0:
            say("requeued")
            _await_end(signals)
            return GAVE_UP
        say("scontrol requeue failed (%s): submitting again" % reply.out.strip())
    return _resubmit(job, place, files, verdict)


def _resubmit(job: Mapping[str, Any], place: JobHosts, files: RunFiles, verdict: JobVerdict) -> int:
    """Submit the job file again, to start after this job. Options of a waiting job cannot be changed from inside it."""
    excluded = ",".join([name for name in (job["exclude"],) if name] + list(verdict.exclude))
    options = ["--dependency=afterany:" + place.key]
    options += ["--exclude=" + excluded] if excluded else []
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        options.append("--array=" + os.environ["SLURM_ARRAY_TASK_ID"])
    reply = resubmit_job(job["script"], options)
    if reply.code:
        why = "%s; but sbatch refused it (%s)" % (verdict.why, reply.out.strip())
        return _exit(files, JobVerdict("exit", GAVE_UP, why), place)
    say("submitted again as job %s" % reply.out)
    record = read_json(job["submit"]) or {}
    record["jobs"] = list(record.get("jobs", [])) + [reply.out]
    write_json(job["submit"], record)
    return verdict.code


def _exit(files: RunFiles, verdict: JobVerdict, place: JobHosts) -> int:
    """Write the result for commands that wait for it. A job that Slurm starts again has no result yet."""
    say("%s: exit code %d" % (verdict.why, verdict.code))
    if verdict.what == "exit":
        result = {"code": verdict.code, "why": verdict.why, "attempt": files.number, "job": place.key}
        write_json(files.control("result.json"), result)
    return verdict.code


def main() -> None:
    """Run the conductor, and end with its exit code."""
    sys.exit(run_conductor(sys.argv[1:]))
