"""The control folder of a run: how a launcher asks the run to stop, and how the run tells it that it has ended.

Every file is one JSON object, replaced as a whole. The launcher writes the first three, rank 0 the others:

- `attempt`: `{"token": N}`, the attempt that may write to the run folder. An attempt with an older token may not.
- `stop`: `{"reason": "deadline|preempted|cancel|user", "attempt": N}`, a request to attempt N. An empty file also is
  one, to every attempt.
- `deadline`: `{"time": unix seconds}`, the end of the machine's allocation.
- `stopped.json`: `{"step": n, "reason": ..., "attempt": N}`, after a stop. Step n is on disk.
- `done.json`: `{"step": n, "time": unix seconds}`, after the export of the trained model.
"""

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.errors import ConfigError, StorageError
from megatron_rl.files import parse_json, replace_file, sync_folder

CONTROL_NAME = "control"  # in the run folder
TOKEN_VARIABLE = "MEGATRON_RL_ATTEMPT"  # token of this process's attempt; unset: that of control/attempt at the start
USER = "user"  # reason of a stop by a signal or by an empty file


@dataclass(frozen=True)
class StopRequest:
    """A request to stop.

    Attributes:
        reason: why, in the launcher's words.
        attempt: the attempt that it is for; None: every attempt.
    """

    reason: str
    attempt: int | None


class RunControl:
    """The control folder of one run, for one attempt.

    Args:
        folder: the run folder.

    Attributes:
        attempt: token of this attempt; 0 without a launcher that counts attempts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / CONTROL_NAME
        own = os.environ.get(TOKEN_VARIABLE, "")
        if own and not own.isdecimal():
            raise ConfigError(f"{TOKEN_VARIABLE} is '{own[:50]}': it must be the number of this attempt, or unset")
        self.attempt = int(own) if own else self._newest_attempt()

    def check_attempt(self) -> None:
        """Raise ConfigError if the run folder belongs to a newer attempt: this one may not write there any more."""
        newest = self._newest_attempt()
        if newest > self.attempt:
            raise ConfigError(
                f"attempt {newest} of the run in {self.folder.parent} has begun, and this is attempt {self.attempt}: "
                "it writes nothing more there; end this process"
            )

    def _newest_attempt(self) -> int:
        found = _read(self.folder / "attempt")
        token = found.get("token") if isinstance(found, dict) else None
        return token if isinstance(token, int) else 0

    def stop_request(self) -> StopRequest | None:
        """Return the request to stop this attempt, if there is one. A request to an earlier attempt is none."""
        found = _read(self.folder / "stop")
        if found is None:
            return None
        found = found if isinstance(found, dict) else {}
        attempt = found.get("attempt")
        request = StopRequest(str(found.get("reason", USER))[:200], attempt if isinstance(attempt, int) else None)
        return None if request.attempt is not None and request.attempt < self.attempt else request

    def deadline(self) -> float | None:
        """Return the unix time at which the allocation ends; None if it is not known."""
        found = _read(self.folder / "deadline")
        end = found.get("time") if isinstance(found, dict) else None
        return float(end) if isinstance(end, (int, float)) and math.isfinite(end) else None

    def begin(self) -> None:
        """Remove what an earlier process said of its end, and the request that it has fulfilled.

        Raises ConfigError as from `check_attempt`.
        """
        self.check_attempt()
        stopped, request = _read(self.folder / "stopped.json"), self.stop_request()
        honored = isinstance(stopped, dict) and request is not None and stopped.get("attempt") == request.attempt
        for name in ("stopped.json", "done.json", *(["stop"] if honored else [])):
            (self.folder / name).unlink(missing_ok=True)

    def write_stopped(self, step: int, reason: str) -> None:
        """Tell that the run has stopped after `step` whole steps, which are on disk.

        A request that names no attempt is removed: it would stop the next one, too.
        """
        request = self.stop_request()
        self._write("stopped.json", {"step": step, "reason": reason, "attempt": self.attempt})
        if request is not None and request.attempt is None:
            (self.folder / "stop").unlink(missing_ok=True)

    def write_done(self, step: int) -> None:
        """Tell that the run has done all of its `step` steps and that the trained model is exported."""
        self._write("done.json", {"step": step, "time": time.time()})

    def done_steps(self) -> int | None:
        """Return the number of steps of a run that is done and exported; None if it is not."""
        found = _read(self.folder / "done.json")
        step = found.get("step") if isinstance(found, dict) else None
        return step if isinstance(step, int) else None

    def _write(self, name: str, content: dict[str, Any]) -> None:
        self.check_attempt()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self.folder / name, json.dumps(content).encode() + b"\n")
            sync_folder(self.folder)
        except OSError as error:
            raise StorageError(f"{self.folder / name} cannot be written ({error}): free space there") from error


def _read(path: Path) -> Any:
    """Return the JSON value of a file; None if there is no file or it cannot be read; {} if it is no JSON."""
    try:
        content = path.read_bytes()
    except OSError:  # a file system that is away for a moment is asked again
        return None
    try:
        return parse_json(content)
    except ValueError:
        return {}
