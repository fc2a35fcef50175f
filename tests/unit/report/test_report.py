import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from megatron_rl.diagnostics import RunLog, ratio_record
from megatron_rl.diagnostics.samples import SampleLog, ShownSample
from megatron_rl.diagnostics.score_chain import ScoreChain
from megatron_rl.errors import UserError
from megatron_rl.report import plot_summary, write_report
from megatron_rl.report.history import History
from megatron_rl.report.plots import PANELS
from megatron_rl.report.style import running_mean

ALL_PANELS = {
    *("reward", "held_out", "kl", "ratio", "mismatch_ratio", "ess", "shift", "clip"),
    *("entropy", "loss", "grad_norm", "response_length", "truncated", "seconds", "throughput"),
}


def write_run(folder: Path, steps: int, evaluations: tuple[int, ...] = ()) -> Path:
    """Write a log with every key, filled with random numbers."""
    rng = np.random.default_rng(0)
    with RunLog(folder) as log:
        for step in range(steps):
            if step in evaluations:
                log.append({"kind": "eval", "step": step, "eval/greedy": 0.2 + step / 100, "eval/sampled": 0.1})
            logmu = np.log(rng.uniform(0.01, 1, 200))
            update = ratio_record(logmu + 0.3 * rng.standard_t(3, 200), logmu)
            first = ratio_record(logmu + 0.01 * rng.standard_normal(200), logmu)
            seconds = {f"seconds/{part}": rng.uniform() for part in ("rollout", "reward", "update", "sync")}
            log.append(
                {
                    "kind": "step",
                    "step": step,
                    "version": step,
                    "reward/mean": rng.uniform(),
                    "pass_rate": rng.uniform(),
                    **update,
                }
                | {f"mismatch/{key}": value for key, value in first.items()}
                | {
                    "entropy": 1.0,
                    "loss": -0.1,
                    "grad_norm": 0.5,
                    "lr": 1e-6,
                    "clip/high": 0.1,
                    "clip/low": 0.0,
                    **seconds,
                }
                | {"seconds/total": sum(seconds.values()) + 0.1, "tokens/response": 500, "tokens_per_s": 1e3}
                | {"response_length/mean": 8.5, "truncated": 0.25}
            )
    return folder


def images(page: Path) -> set[str]:
    return set(re.findall(r'<img src="([^"]+)\.png"', page.read_text()))


def is_drawn(png: Path) -> bool:
    """Return True if the picture has a dark title and something in color."""
    pixels = np.asarray(Image.open(png).convert("RGB")).astype(int)
    colorful = (pixels.max(axis=2) - pixels.min(axis=2)) > 60
    return bool((pixels.sum(axis=2) < 150).any() and colorful.any())


@pytest.mark.parametrize(("steps", "evaluations"), [(1, (0,)), (12, (0, 11)), (100, (0, 40, 80))])
def test_the_report_of_a_full_log_draws_every_panel(tmp_path, steps, evaluations):
    page = write_report(write_run(tmp_path, steps, evaluations))
    assert page == tmp_path / "report" / "index.html"
    assert images(page) == ALL_PANELS
    assert {png.stem for png in page.parent.glob("*.png")} == ALL_PANELS
    assert all(is_drawn(page.parent / f"{name}.png") for name in ALL_PANELS)


def test_keys_a_log_does_not_carry_are_not_drawn(tmp_path):
    with RunLog(tmp_path) as log:
        for step in range(3):
            log.append({"kind": "step", "step": step, "entropy": 1.0 - step, "loss": float("nan")})
    page = write_report(tmp_path)
    assert images(page) == {"entropy"}
    assert "gradient norm" not in page.read_text()


def test_the_table_shows_first_last_least_and_most_of_the_log(tmp_path):
    with RunLog(tmp_path) as log:
        for step, value in enumerate([2.0, 5.0, 0.5, 3.0]):
            log.append({"kind": "step", "step": step, "entropy": value})
    cells = re.findall(r"<td[^>]*>(?:<[^>]+>)?([^<]*)", write_report(tmp_path).read_text())
    assert cells == ["entropy", "2", "3", "0.5", "5"]


def test_name_steps_and_configuration_are_shown_as_text(tmp_path):
    folder = write_run(tmp_path / "a <run>", 3)
    (folder / "config.yaml").write_text("model: {path: '<b>&'}\n")
    text = write_report(folder).read_text()
    assert "a &lt;run&gt;" in text
    assert "&lt;b&gt;&amp;" in text
    assert "<b>" not in text
    assert re.search(r"<dt>steps</dt><dd>3</dd>", text)
    assert not re.search(r'(src|href)="(https?:)?//', text)


def test_the_best_the_worst_and_the_most_mismatched_responses_of_the_last_step_are_shown_as_text(tmp_path):
    write_run(tmp_path, 2)
    k3 = (0.1, None, 0.7, 0.2, 0.3, 0.0, 0.4)
    for step in (0, 1):
        rows = [
            ShownSample(step, i, f"p{i}", "1+1=", f"<b>s{step} r{i}</b>", i / 10, 5, "stop", k3[i]) for i in range(7)
        ]
        SampleLog(tmp_path).append(rows)
    text = write_report(tmp_path).read_text()
    assert "Responses of step 1" in text and "s0 r" not in text and "<b>" not in text
    found = re.findall(r"<h3>([\w ]+)</h3>|&lt;b&gt;s1 (r\d)&lt;/b&gt;", text)
    shown = [title or row for title, row in found]
    assert shown == ["Best", "r6", "r5", "r4", "Worst", "r0", "r1", "r2", "Most mismatched", "r2", "r6", "r4"]
    assert "k3 7.00e-01 nats/token" in text and "trajectory 2 of prompt p2" in text


def test_responses_without_log_probabilities_of_the_engine_have_no_mismatch(tmp_path):
    write_run(tmp_path, 1)
    SampleLog(tmp_path).append([ShownSample(0, 3, "p", "1+1=", "2", 1.0, 1, "stop", None)])
    text = write_report(tmp_path).read_text()
    assert "Best" in text and "Most mismatched" not in text and "k3 " not in text.split("Responses of step")[1]


def test_a_ratio_that_reached_zero_or_infinity_is_still_drawn(tmp_path):
    folder = write_run(tmp_path, 5)
    log = folder / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    records[1]["ratio/min"] = 0.0
    records[2]["ratio/max"] = None
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert is_drawn(write_report(folder).parent / "ratio.png")


def test_rounds_of_teacher_and_student_are_drawn(tmp_path):
    with RunLog(tmp_path) as log:
        for step in range(2):
            lists = {f"erpd/{stage}/loss": [0.5, None, 0.25] for stage in ("teacher", "student")}
            bins = {
                "edges": [0.0, 0.1, 1.0],
                "count": [4, 5, 0],
                "mean": [0.3, 90.0, None],
                "median": [0.2, 80.0, None],
            }
            lists |= {f"erpd/shift/{name}": values for name, values in bins.items()}
            rates = {"erpd/teacher/greedy": 0.5} if step else {}
            log.append({"kind": "erpd", "step": step, "erpd/teacher/kl": 0.2, "erpd/student/kl": 0.001} | lists | rates)
            log.append({"kind": "eval", "step": step + 1, "eval/greedy": 0.6, "eval/sampled": 0.5})
    page = write_report(tmp_path)
    assert images(page) == {"held_out", "erpd_kl", "erpd_rates", "erpd_shift", "erpd_stages"}
    assert all(is_drawn(page.parent / f"{name}.png") for name in images(page))


def test_the_sources_of_the_mismatch_are_drawn_where_they_were_attributed(tmp_path):
    rng = np.random.default_rng(0)
    with RunLog(tmp_path) as log:
        for step in (10, 20):
            chain = ScoreChain.of(np.cumsum(0.01 * rng.standard_normal((8, 50)), axis=0))
            log.append({"kind": "attribution", "step": step, "version": step, **chain.record()})
    page = write_report(tmp_path)
    assert images(page) == {"attribution"} and is_drawn(page.parent / "attribution.png")


def test_staleness_is_drawn_where_tokens_were_older_than_the_weights_trained(tmp_path):
    for name, ages in (("ahead", (0, 1, 2)), ("on_policy", (0,))):
        with RunLog(tmp_path / name) as log:
            for step in range(5):
                record = {f"mismatch/stale_{age}/k3": 10.0 ** (age - 4) * (1 + step) for age in ages}
                log.append({"kind": "step", "step": step, "staleness/mean": 0.7, "staleness/max": max(ages), **record})
    page = write_report(tmp_path / "ahead")
    assert images(page) == {"staleness", "by_staleness"}
    assert all(is_drawn(page.parent / f"{name}.png") for name in images(page))
    assert images(write_report(tmp_path / "on_policy")) == set()


def test_the_summary_is_one_picture(tmp_path):
    plot_summary(write_run(tmp_path, 10, (0, 9)), tmp_path / "summary.png")
    assert is_drawn(tmp_path / "summary.png")


def test_the_summary_leaves_out_what_the_log_does_not_carry(tmp_path):
    with RunLog(tmp_path) as log:
        log.append({"kind": "step", "step": 0, "reward/mean": 0.5})
    plot_summary(tmp_path, tmp_path / "summary.png")
    assert is_drawn(tmp_path / "summary.png")


def test_a_run_without_records_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run log"):
        write_report(tmp_path)
    RunLog(tmp_path).close()
    with pytest.raises(UserError, match="empty"):
        write_report(tmp_path)


def test_the_running_mean_keeps_constants_and_averages_around_each_value():
    assert running_mean(np.full(7, 3.0), 3).tolist() == [3.0] * 7
    np.testing.assert_allclose(running_mean(np.array([0.0, 3, 6, 0]), 3), [1.5, 3, 3, 3])


@pytest.mark.parametrize(
    ("spread", "label", "expected"),
    [
        (4e-7, "pi / mu - 1, in units of 1e-7", 4.0),
        (0.03, "pi / mu - 1, in units of 1e-2", 3.0),
        (0.4, "ratio pi / mu", 1.4),
        (0.0, "ratio pi / mu", 1.0),
    ],
)
def test_ratios_near_one_are_drawn_as_deviations_in_units(tmp_path, spread, label, expected):
    quantiles = ("min", "q01", "q05", "q25", "q50", "q75", "q95", "q99", "max")
    with RunLog(tmp_path) as log:
        for step in range(3):
            values = {f"mismatch/ratio/{name}": 1 + spread * (at - 4) / 4 for at, name in enumerate(quantiles)}
            log.append({"kind": "step", "step": step, **values})
    (panel,) = [panel for panel in PANELS if panel.name == "mismatch_ratio"]
    ax = Figure().subplots()
    panel.on(ax, History.of(tmp_path))
    assert ax.get_ylabel() == label
    assert max(line.get_ydata().max() for line in ax.get_lines()) == pytest.approx(expected, rel=1e-6)
    ax.figure.canvas.draw()
    assert ax.yaxis.get_offset_text().get_text() == ""
