import csv
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_rl.study.page import write_page
from megatron_rl.study.verdict import make_verdict
from tests.unit.study.simulated import TrueArm, simulate_study

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FIGURES = {"differences", "reward_curves", "mismatch_growth", "reward_against_mismatch", "mismatch_against_size"}
ARMS = {"bf16": TrueArm(), "fp8": TrueArm(k3=3e-3), "<nvfp4>": TrueArm(collapse_at=10, k3=5e-2)}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    absent = {"fp8-2M-s1": "failed"}
    simulate_study(folder, ARMS, sizes={"1M": 10**6, "2M": 2 * 10**6}, seeds=3, prompts=20, steps=20, absent=absent)
    return write_page(folder, make_verdict(folder)).parent


def test_the_page_stands_alone_with_its_sentences_first(report: Path) -> None:
    page = (report / "index.html").read_text()
    assert set(re.findall(r'src="(.{10})', page)) == {"data:image"}
    assert "http" not in page
    assert page.count("data:image/png;base64,") == len(FIGURES) + 1
    head = page[: page.index("<figure")]
    assert "equivalence to bf16 within 5 points not shown" in head or "equivalent to bf16 within 5 points" in head
    assert "6 configurations tried; failed: fp8-2M-s1" in head
    assert "PrecisionError: the gradient is not finite" in page
    assert "0123456789abcdef" in page


def test_names_of_arms_are_text_and_not_markup(report: Path) -> None:
    page = (report / "index.html").read_text()
    assert "&lt;nvfp4&gt; at 1M" in page
    assert "<nvfp4>" not in page


def test_every_figure_is_a_picture_and_a_table(report: Path) -> None:
    names = {path.stem for path in report.glob("*.png")}
    assert names == {path.stem for path in report.glob("*.csv")} == FIGURES | {"collapse"}
    for name in names:
        with Image.open(report / f"{name}.png") as image:
            assert image.convert("L").getextrema()[0] < 100, f"{name} is blank"
    with (report / "differences.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["size"], row["arm"]) for row in rows] == [(s, a) for s in ("1M", "2M") for a in ("fp8", "<nvfp4>")]
    assert all(float(row["low"]) < float(row["difference"]) < float(row["high"]) for row in rows if row["low"])
    with (report / "reward_curves.csv").open() as file:
        assert all(float(r["p02"]) <= float(r["mean"]) <= float(r["p98"]) for r in csv.DictReader(file))


def test_a_study_without_a_finished_cell_has_a_page(tmp_path: Path) -> None:
    absent = {"bf16-s0": "missing", "fp8-s0": "failed"}
    arms = {"bf16": TrueArm(), "fp8": TrueArm()}
    folder = simulate_study(tmp_path, arms, seeds=1, absent=absent)
    page = write_page(folder, make_verdict(folder)).read_text()
    assert "no cell is done" in page
    assert "<img" not in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_a_browser_shows_the_page_from_edge_to_edge(report: Path, tmp_path: Path) -> None:
    """The screenshot is as wide as the window, has the figures' colors, and nothing sticks out to the right."""
    picture = tmp_path / "page.png"
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,4000", f"--screenshot={picture}"]
    subprocess.run(
        [*command, (report / "index.html").as_uri()],
        check=True,
        timeout=600,
        capture_output=True,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (4000, 1280, 3)
    background = np.array([246, 247, 249])
    assert (np.abs(pixels[:, 1270:] - background).sum(-1) < 6).all(), "something sticks out of the page"
    for color in ((194, 65, 59), (37, 99, 168)):  # a red sentence, a blue curve
        assert (np.abs(pixels - color).sum(-1) < 12).sum() > 200
