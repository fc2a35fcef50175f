"""Shows how far a conversion is: a bar on a terminal, a line now and then elsewhere."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

_EVERY = 10.0  # seconds between two lines


class Progress:
    """Bytes that a conversion has written, of all bytes.

    Args:
        total: bytes of the conversion.
        title: name of the conversion.
    """

    def __init__(self, total: int, title: str) -> None:
        self.total, self.written, self._before = total, 0, 0
        self._began = self._said = time.monotonic()
        self._title = title
        columns = TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        self._bar = RichProgress(*columns, console=Console(stderr=True)) if sys.stderr.isatty() else None
        self._task = None if self._bar is None else self._bar.add_task(title, total=total)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def skip(self, nbytes: int) -> None:
        """Count bytes that an earlier start has written."""
        self._before += nbytes
        self._show()

    def add(self, nbytes: int) -> None:
        """Count bytes that were just written."""
        self.written += nbytes
        self._show()

    @property
    def rate(self) -> float:
        """Bytes a second since the start."""
        return self.written / max(1e-9, time.monotonic() - self._began)

    @contextmanager
    def following(self, counter: Any) -> Iterator[None]:
        """Show the value of a counter that other processes increase."""
        ended = threading.Event()

        def follow() -> None:
            while not ended.wait(0.2):
                self.add(counter.value - self.written)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.add(counter.value - self.written)

    def _show(self) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._before + self.written)
        elif time.monotonic() - self._said > _EVERY:
            self._said = time.monotonic()
            share, left = (self._before + self.written) / max(1, self.total), self.total - self._before - self.written
            seconds = left / max(1.0, self.rate)
            print(f"{self._title}: {share:.0%}, {self.rate / 1e9:.2f} GB/s, {seconds:.0f} s left", file=sys.stderr)
