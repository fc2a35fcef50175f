"""The live line of a run: step, reward, KL, tokens per second, time left."""

import sys
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressLine:
    """A rich progress line on a terminal, else one plain line per step.

    Args:
        title: text at the start of the line.
        total: number of steps of the run.
        done: number of steps that are already done.
        enabled: print; False on ranks other than 0.
    """

    def __init__(self, title: str, total: int, done: int, *, enabled: bool) -> None:
        self.title, self.total, self.enabled = title, total, enabled
        self.live: Progress | None = None
        if enabled and sys.stdout.isatty():
            columns = (MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
            self.live = Progress(TextColumn("{task.description}"), BarColumn(20), *columns, console=Console())
            self.task = self.live.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def step(self, record: dict[str, Any]) -> None:
        """Show reward, KL and tokens per second of one step's record."""
        parts = [f"reward {record['reward/mean']:.3f}"]
        if "kl/k3" in record:
            parts.append(f"KL {record['kl/k3']:.2e}")
        parts.append(f"{record['tokens_per_s']:,.0f} tok/s")
        self.show(" | ".join(parts), record["step"] + 1)

    def note(self, text: str) -> None:
        """Print a line that the live line does not overwrite."""
        if self.live:
            self.live.console.print(text)
        elif self.enabled:
            print(text, flush=True)

    def show(self, text: str, done: int) -> None:
        """Set the number of finished steps to `done`, and show `text`."""
        if self.live:
            self.live.update(self.task, completed=done, note=text)
        elif self.enabled:
            print(f"{self.title} {done}/{self.total} | {text}", flush=True)
