"""The report page of one run."""

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from megatron_rl.report.history import History, Series
from megatron_rl.report.plots import save_panels
from megatron_rl.report.sample_table import sample_lists

_ROWS = (
    ("eval/greedy", "held-out pass rate, greedy", "share"),
    ("eval/sampled", "held-out pass rate, sampled", "share"),
    ("reward/mean", "mean reward", ""),
    ("pass_rate", "pass rate", "share"),
    ("kl/k1", "KL(mu || pi), k1", "nats/token"),
    ("kl/k3", "KL(mu || pi), k3", "nats/token"),
    ("mismatch/kl/k3", "KL at equal weights, k3", "nats/token"),
    ("ratio/q01", "ratio, 1 % quantile", ""),
    ("ratio/q99", "ratio, 99 % quantile", ""),
    ("ratio/max", "ratio, maximum", ""),
    ("ratio/ess", "effective sample share", "share"),
    ("dp/max", "largest probability shift", ""),
    ("erpd/teacher/kl", "KL(teacher || old policy)", "nats/token"),
    ("erpd/student/kl", "KL(student || old policy)", "nats/token"),
    ("erpd/teacher/explained_variance", "variance of rewards explained by the teacher", "share"),
    ("entropy", "entropy", "nats/token"),
    ("grad_norm", "gradient norm", ""),
    ("lr", "learning rate", ""),
    ("response_length/mean", "response length", "tokens"),
    ("truncated", "truncated responses", "share"),
    ("tokens_per_s", "throughput", "tokens/s"),
    ("seconds/total", "step time", "s"),
)


@dataclass(frozen=True)
class TableRow:
    """One line of the summary table, with formatted numbers."""

    label: str
    unit: str
    first: str
    last: str
    least: str
    most: str


def write_report(run_folder: Path | str) -> Path:
    """Draw `report/index.html` and its PNGs from `log.jsonl` of a run, and return the path of the page.

    The page also shows `config.yaml`, and some responses of `samples.jsonl`. Keys that the log does not contain are not
    drawn.

    Raises:
        UserError: there is no log, or it is empty.
    """
    run_folder = Path(run_folder)
    history = History.of(run_folder)
    folder = run_folder / "report"
    folder.mkdir(exist_ok=True)
    panels = save_panels(history, folder)
    samples_step, samples = sample_lists(run_folder)
    config = run_folder / "config.yaml"
    page = folder / "index.html"
    page.write_text(
        _template().render(
            name=history.name,
            facts=_facts(history),
            rows=_rows(history),
            panels=panels,
            samples_step=samples_step,
            samples=samples,
            config=config.read_text(encoding="utf-8") if config.is_file() else None,
        ),
        encoding="utf-8",
    )
    return page


def _template() -> Template:
    folder = FileSystemLoader(Path(__file__).parent)
    pages = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return pages.get_template("report.html.j2")


def _facts(history: History) -> list[tuple[str, str]]:
    """Return the large numbers at the top of the page, as (label, value)."""
    steps = [record["step"] for record in history.records if record.get("kind") == "step"]
    facts = [("steps", f"{len(steps)}")]
    for key, label in (
        ("eval/greedy", "held-out, greedy"),
        ("eval/sampled", "held-out, sampled"),
        ("pass_rate", "pass rate"),
    ):
        column = history.column(key)
        if len(column) > 1:
            facts.append((label, f"{column.values[0]:.0%} \N{RIGHTWARDS ARROW} {column.values[-1]:.0%}"))
    seconds, tokens = history.column("seconds/total"), history.column("tokens/response")
    if len(tokens):
        facts.append(("response tokens", f"{tokens.values.sum():,.0f}"))
    if len(seconds):
        facts.append(("time in steps", _duration(seconds.values.sum())))
    return facts


def _rows(history: History) -> list[TableRow]:
    columns = [(label, unit, history.column(key)) for key, label, unit in _ROWS]
    return [_row(label, unit, column) for label, unit, column in columns if len(column)]


def _row(label: str, unit: str, column: Series) -> TableRow:
    values = column.values
    first, last, least, most = (_number(value) for value in (values[0], values[-1], values.min(), values.max()))
    return TableRow(label, unit, first, last, least, most)


def _number(value: float) -> str:
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
