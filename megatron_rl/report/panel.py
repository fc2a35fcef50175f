"""One figure of a report: what it shows, and when it is drawn."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes

from megatron_rl.report.history import History


@dataclass(frozen=True)
class Panel:
    """One figure, drawn if a record contains one of the `keys`, and saved as `name`.png."""

    name: str
    title: str
    caption: str
    keys: tuple[str, ...]
    draw: Callable[[Axes, History], None]

    def shown(self, history: History) -> bool:
        return any(history.has(key) for key in self.keys)

    def on(self, ax: Axes, history: History) -> None:
        ax.set_title(self.title)
        self.draw(ax, history)
