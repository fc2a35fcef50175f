"""The logger `wandb`: configuration, numbers and the report's pictures, sent to Weights & Biases."""

import importlib.util
import os
import secrets
from collections.abc import Mapping
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from megatron_rl.diagnostics import read_log
from megatron_rl.diagnostics.samples import ShownSample, read_shown_samples
from megatron_rl.errors import ConfigError
from megatron_rl.report import write_report

ID_NAME = "wandb_id"  # file of the run folder
_MOST_SAMPLES = 1000  # rows of the table of samples: the last ones


class WandbLogger:
    """One W&B run for each run folder. Its id is kept there, so a resumed run continues it.

    The x axis is `step`. W&B keeps what it received, so steps that run again after a resume appear twice there.
    `WANDB_MODE=offline` writes to `wandb/` in the run folder; `WANDB_PROJECT` and `WANDB_ENTITY` choose the place.
    """

    @staticmethod
    def check() -> None:
        """Raise ConfigError if the package is not installed."""
        spec = importlib.util.find_spec("wandb")
        if spec is None or spec.origin is None:  # a folder wandb/ with the files of runs also has a spec
            raise ConfigError("run.loggers: wandb needs a package that is missing: pip install megatron_rl[wandb]")

    def start(self, config: Mapping[str, Any], folder: Path, resume_from: int | None) -> None:
        """Begin the W&B run, or continue that of the run folder."""
        import wandb  # heavy and optional

        self._folder = folder
        self._run = wandb.init(
            dir=str(folder),
            id=_run_id(folder),
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", "megatron_rl"),
            name=config["run"]["name"],
            config=dict(config),
            settings=wandb.Settings(console="off"),  # it would replace stdout under the live line
        )
        self._image, self._table = wandb.Image, wandb.Table
        self._run.define_metric("*", step_metric="step")

    def log(self, record: Mapping[str, Any]) -> None:
        """Send the numbers of one record."""
        self._run.log({key: value for key, value in record.items() if isinstance(value, (int, float))})

    def close(self) -> None:
        """Draw the report, send its pictures and the newest samples, and end the W&B run."""
        try:
            records = read_log(self._folder)
            if records:
                pictures = sorted(write_report(self._folder).parent.glob("*.png"))
                found: dict[str, Any] = {f"report/{picture.stem}": self._image(str(picture)) for picture in pictures}
                if samples := read_shown_samples(self._folder):
                    columns = [field.name for field in fields(ShownSample)]
                    found["samples"] = self._table(columns, [list(astuple(row)) for row in samples[-_MOST_SAMPLES:]])
                self._run.log({"step": records[-1]["step"], **found})
        finally:
            self._run.finish()


def _run_id(folder: Path) -> str:
    """Return the id of the folder's W&B run; make one the first time."""
    path = folder / ID_NAME
    if not path.is_file():
        path.write_text(secrets.token_hex(4), encoding="ascii")
    return path.read_text(encoding="ascii").strip()
