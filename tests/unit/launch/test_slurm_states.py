"""Every state of Slurm has a meaning for a run."""

import pytest

from megatron_rl.launch.conductor.slurm_states import read_state

MEANINGS = {
    "waiting": "PENDING CONFIGURING REQUEUED REQUEUE_HOLD REQUEUE_FED RESV_DEL_HOLD SPECIAL_EXIT SUSPENDED STOPPED",
    "running": "RUNNING COMPLETING SIGNALING STAGE_OUT RESIZING",
    "lost": "PREEMPTED NODE_FAIL BOOT_FAIL LAUNCH_FAILED RECONFIG_FAIL",
    "ended": "TIMEOUT DEADLINE FAILED OUT_OF_MEMORY CANCELLED REVOKED",
}


@pytest.mark.parametrize("meaning", MEANINGS)
def test_states_by_meaning(meaning: str) -> None:
    assert {read_state(state) for state in MEANINGS[meaning].split()} == {meaning}


def test_a_completed_job_is_done_only_with_a_result() -> None:
    assert read_state("COMPLETED", done=True) == "done"
    assert read_state("COMPLETED") == "ended without a result"


def test_a_lost_job_with_a_later_attempt_waits() -> None:
    assert read_state("NODE_FAIL", again=True) == read_state("PREEMPTED", again=True) == "waiting"


def test_a_dependency_that_cannot_come_is_dead() -> None:
    assert read_state("PENDING", "DependencyNeverSatisfied") == "dead"
    assert read_state("PENDING", "Resources") == "waiting"


def test_suffixes_and_unknown_words() -> None:
    assert read_state("CANCELLED by 0") == read_state("CANCELLED+") == "ended"
    assert read_state("NEW_STATE") == "unknown (NEW_STATE)"
