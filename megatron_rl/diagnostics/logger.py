"""The interface of a logger: a second place that the records of a run go to, beside the run log."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Logger(Protocol):
    """Receives every record of a run, on rank 0. Its class is constructed without arguments.

    Every method may raise anything. The run then ends with an error that names the logger.
    """

    def start(self, config: Mapping[str, Any], folder: Path, resume_from: int | None) -> None:
        """Begin a run, or go on with it. Called once, before `log`.

        Args:
            config: the resolved configuration, section -> key -> plain value.
            folder: the run folder.
            resume_from: first step that this process runs, 0 for a new run. Records of this step and later ones that
                the logger received before will come again. None if no step will run: `megatron-rl attribute`.
        """
        ...

    def log(self, record: Mapping[str, Any]) -> None:
        """Receive one record, after it was written to `log.jsonl`.

        Its keys are those of docs/reference/metrics.md. Its values are numbers, text, bools, None and lists of numbers.
        """
        ...

    def close(self) -> None:
        """End. Called once, also after an error or an interrupt."""
        ...
