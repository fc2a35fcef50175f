"""The logger `tensorboard`: numbers of the records, as event files in the run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger:
    """Writes every number of a record to `tb/`. Lists and text are left out."""

    def start(self, config: Mapping[str, Any], folder: Path, resume_from: int | None) -> None:
        """Open the event file. TensorBoard hides events of earlier files from `resume_from` on."""
        self._board = SummaryWriter(str(folder / "tb"), purge_step=resume_from)

    def log(self, record: Mapping[str, Any]) -> None:
        """Write the numbers of one record."""
        for key, value in record.items():
            if key != "step" and isinstance(value, (int, float)):
                self._board.add_scalar(key, value, record["step"])
        self._board.flush()

    def close(self) -> None:
        """Close the event file."""
        self._board.close()
