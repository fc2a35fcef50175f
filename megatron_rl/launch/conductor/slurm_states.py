"""What Slurm's job states mean for a run."""

# Our own words: Slurm no longer has the job in its queue; Slurm does not respond.
FORGOTTEN, SILENT = "FORGOTTEN", "SILENT"
_WAITING = "PENDING CONFIGURING REQUEUED REQUEUE_HOLD REQUEUE_FED RESV_DEL_HOLD SPECIAL_EXIT SUSPENDED STOPPED"
_RUNNING = "RUNNING COMPLETING SIGNALING STAGE_OUT RESIZING"
_LOST = "PREEMPTED NODE_FAIL BOOT_FAIL LAUNCH_FAILED RECONFIG_FAIL POWER_UP_NODE EXPEDITING"
_ENDED = "TIMEOUT DEADLINE FAILED OUT_OF_MEMORY CANCELLED REVOKED"
_MEANING = {}
for _names, _meaning in ((_WAITING, "waiting"), (_RUNNING, "running"), (_LOST, "lost"), (_ENDED, "ended")):
    _MEANING.update(dict.fromkeys(_names.split(), _meaning))


def read_state(state: str, reason: str = "", done: bool = False, again: bool = False) -> str:
    """Return what a state of a job means: waiting, running, done, dead, lost, ended, "ended without a result", unknown.

    Args:
        state: Slurm's word, such as RUNNING or `CANCELLED by 0`.
        reason: Slurm's reason for waiting.
        done: the run has written `done.json`.
        again: a later attempt or job of the run exists.
    """
    word = state.split()[0].rstrip("+") if state.split() else ""
    if word == SILENT:
        return "Slurm does not respond"
    if word == "COMPLETED":
        return "done" if done else "ended without a result"
    meaning = _MEANING.get(word, "unknown (%s)" % state)
    if meaning == "waiting" and reason == "DependencyNeverSatisfied":
        return "dead"
    if meaning == "lost" and again:
        return "waiting"
    return meaning
