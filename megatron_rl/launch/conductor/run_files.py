"""What a run keeps of its attempts: their records, and the folders of their logs."""

import os
import shutil
import time
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from megatron_rl.launch.conductor.control_files import ATTEMPTS, append_line, read_json_lines, remove, write_json

ENGINES = "engines"
OF_AN_ATTEMPT = ("stop", "stopped.json", "deadline", "result.json")


class RunFiles:
    """The folders `control` and `logs` of a run, for one attempt."""

    def __init__(self, run: str, submission: str) -> None:
        """Take the run folder and the name of the submission; bounds count the attempts of one submission."""
        self.run, self._submission = run, submission
        self.records = read_json_lines(self.control(ATTEMPTS))
        self._earlier = [one for one in self.records if "checkpoint" in one and one.get("submission") == submission]
        self.number = 1 + len([one for one in self.records if "checkpoint" in one])
        self.logs = os.path.join(run, "logs", "attempt-%d" % self.number)

    def control(self, name: str) -> str:
        """Return the path of a control file."""
        return os.path.join(self.run, "control", name)

    def engine(self, name: str) -> str:
        """Return the file with which an engine is registered for the trainer (`rollout.urls_dir`)."""
        return self.control(os.path.join(ENGINES, name + ".json"))

    @property
    def attempts(self) -> int:
        """Attempts of this submission, with this one."""
        return 1 + len(self._earlier)

    def begin(self, facts: Mapping[str, Any], checkpoint: int) -> None:
        """Record the start of this attempt, publish its token, remove the files of an earlier one, make its folder."""
        os.makedirs(self.logs, exist_ok=True)
        for name in OF_AN_ATTEMPT:
            remove(self.control(name))
        shutil.rmtree(self.control(ENGINES), ignore_errors=True)
        os.makedirs(self.control(ENGINES))
        write_json(self.control("attempt"), {"token": self.number})
        record = {"attempt": self.number, "submission": self._submission, "time": time.time(), "checkpoint": checkpoint}
        append_line(self.control(ATTEMPTS), dict(record, **facts))
        self._link_latest()

    def _link_latest(self) -> None:
        link = os.path.join(self.run, "logs", "latest")
        partial = "%s.%d" % (link, os.getpid())
        remove(partial)
        os.symlink(os.path.basename(self.logs), partial)
        os.replace(partial, link)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Record the end of this attempt."""
        append_line(self.control(ATTEMPTS), dict(facts, attempt=self.number, end=time.time()))

    def without_progress(self, checkpoint: int) -> int:
        """Return the number of attempts in a row, with this one, that made no checkpoint newer than they found.

        Args:
            checkpoint: the step of the newest checkpoint now.
        """
        own = [one["checkpoint"] for one in read_json_lines(self.control(ATTEMPTS)) if self._is_of_submission(one)]
        return count_stuck([*own, checkpoint])

    def _is_of_submission(self, record: Mapping[str, Any]) -> bool:
        return "checkpoint" in record and record.get("submission") == self._submission

    def failed_before(self, suspects: Sequence[str]) -> Tuple[str, ...]:
        """Return those of the nodes that an earlier attempt of this submission also recorded as suspects."""
        own = {one["attempt"] for one in self._earlier}
        before = {node for one in self.records if one["attempt"] in own for node in one.get("suspects", ())}
        return tuple(node for node in suspects if node in before)


def count_stuck(checkpoints: Sequence[int]) -> int:
    """Return how many of the last steps from one number to the next do not rise."""
    count = 0
    for before, after in zip(reversed(checkpoints[:-1]), reversed(checkpoints[1:])):
        if after > before:
            break
        count += 1
    return count


def summarize(records: Sequence[Mapping[str, Any]]) -> List[Dict[str, Any]]:
    """Return one mapping per attempt: its start, with the fields of its end."""
    found: Dict[int, Dict[str, Any]] = {}
    for record in records:
        found.setdefault(record["attempt"], {}).update(record)
    return [found[number] for number in sorted(found)]
