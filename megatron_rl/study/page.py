"""The page of a study: its sentences first, then figures, numbers, cells and where they were computed."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megatron_rl.files import replace_file
from megatron_rl.study.cell_status import DONE
from megatron_rl.study.figures import save_figures
from megatron_rl.study.sentences import COLLAPSES, EQUIVALENT, HIGHER, LOWER, NOT_SHOWN, STABLE, Unit, label
from megatron_rl.study.study_data import StudyData

_TONES = {
    EQUIVALENT: "good",
    LOWER: "bad",
    HIGHER: "blue",
    COLLAPSES: "bad",
    STABLE: "open",
    NOT_SHOWN: "open",
}
_TO = "\N{NO-BREAK SPACE}..\N{NO-BREAK SPACE}"  # a narrow table breaks before an interval, not inside it
_SHOWN_CELLS = 12  # with more, the table of cells is folded


def write_page(folder: Path, verdict: dict[str, Any]) -> Path:
    """Write `report/index.html` of a study, and the PNG and CSV of every figure beside it; return the page's path.

    The page holds its figures, so that the one file can be sent.

    Args:
        folder: the folder of the study, with `results/`.
        verdict: what `make_verdict` returned.

    Raises:
        UserError: results are missing or malformed.
    """
    data = StudyData.of(folder)
    report = folder / "report"
    report.mkdir(exist_ok=True)
    figures = save_figures(data, verdict, report)
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = report / "index.html"
    text = pages.get_template("study.html.j2").render(
        verdict=verdict,
        facts=_facts(data, verdict),
        claims=[(title, _claims(verdict, about)) for title, about in (("Reward", "reward"), ("Collapse", "collapse"))],
        figures=[(figure, _inline(report / f"{figure.name}.png")) for figure in figures],
        differences=_differences(verdict),
        efforts=_efforts(verdict),
        variance=_variance(verdict),
        origins=_origins(verdict),
        fold_cells=len(verdict["cells"]) > _SHOWN_CELLS,
    )
    replace_file(page, text.encode())
    return page


def _inline(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _facts(data: StudyData, verdict: dict[str, Any]) -> list[tuple[str, str]]:
    done = sum(cell["status"] == DONE for cell in verdict["cells"])
    unit = " points" if verdict["points"] else ""
    margin = "none given" if verdict["margin"] is None else f"± {_number(verdict['margin'], verdict)}{unit}"
    return [
        ("cells done", f"{done} of {len(verdict['cells'])}"),
        ("arms", f"{len(data.record['arms'])}"),
        ("sizes", f"{len(data.sizes)}"),
        ("seeds", f"{len(data.record['seeds'])}"),
        ("configurations tried", f"{verdict['configurations']}"),
        ("margin", margin),
    ]


def _claims(verdict: dict[str, Any], about: str) -> list[dict[str, str]]:
    """Return the sentences about one subject; arms about which the same is said share one sentence."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for one in verdict["sentences"]:
        if one["about"] == about:
            head, _, rest = one["text"].partition(": ")
            same = found.get((rest, one["beside"]))
            if same is None:
                found[rest, one["beside"]] = {**one, "head": head, "rest": rest, "tone": _TONES[one["result"]]}
            else:
                same["head"] += f", {head}"
    return list(found.values())


def _differences(verdict: dict[str, Any]) -> list[dict[str, str]]:
    """Return the rows of the table of differences."""
    rows = []
    for arm in verdict["arms"]:
        found = arm["comparison"]
        seeds = arm["seeds"] if found is None else found["seeds"]
        about = {"name": _name(arm), "seeds": "one seed" if len(seeds) == 1 else str(len(seeds))}
        about["reward"] = _interval(arm["reward"], verdict, value=True)
        if found is None:
            rows.append(about)
            continue
        rows.append(
            {
                **about,
                "difference": _interval(found["difference"], verdict, value=True),
                "same_prompts": _interval(found["difference_for_these_prompts"], verdict),
                "bootstrap": _interval(found["bootstrap"], verdict),
                "seed_sd": _interval(found["seed_sd"], verdict, value=True),
                "detectable": _optional(found["detectable"], verdict),
                "needed": _or_dash(found["seeds_for_equivalence"]),
            }
        )
    return rows


def _efforts(verdict: dict[str, Any]) -> list[dict[str, str]]:
    """Return the rows of the table of mismatch, ceiling and speed."""
    rows = []
    for arm in verdict["arms"]:
        stability, sigmoid, curves = arm["stability"], arm["sigmoid"], arm.get("curves")
        speed = arm.get("speed_up", {})
        at_80 = {
            unit: next((one["ratio"] for one in found if one["share"] == 0.8), None) for unit, found in speed.items()
        }
        ceiling = "-"
        if sigmoid is not None:
            ceiling = _interval(sigmoid["ceiling"], verdict, value=True) if sigmoid["identified"] else "not identified"
        rows.append(
            {
                "name": _name(arm),
                "mismatch": _ratio(stability["mismatch_k3"]),
                "growth": _ratio(stability["growth"]),
                "ceiling": ceiling,
                "model": "-" if curves is None else curves["best_model"],
                "steps": _ratio(at_80.get("steps")),
                "gpu_seconds": _ratio(at_80.get("gpu_seconds")),
                "break_even": _ratio(arm.get("break_even_tokens")),
            }
        )
    return rows


def _variance(verdict: dict[str, Any]) -> list[tuple[str, list[tuple[str, float]]]]:
    return [(size, list(shares.items())) for size, shares in verdict["variance"].items() if shares is not None]


def _origins(verdict: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what computed the cells: each different value once."""
    origins = [cell["provenance"] for cell in verdict["cells"] if cell["provenance"]]
    found = []
    for name in ("revision", "device", "host", "versions"):
        values = [origin[name] for origin in origins if origin.get(name) is not None]
        texts = dict.fromkeys(
            ", ".join(f"{key} {version}" for key, version in value.items()) if isinstance(value, dict) else str(value)
            for value in values
        )
        found.append((name, "; ".join(texts) or "not recorded"))
    return found


def _name(arm: dict[str, Any]) -> str:
    return label(arm["arm"], arm["size"])


def _number(value: float, verdict: dict[str, Any]) -> str:
    return Unit(verdict["points"]).number(value)


def _optional(value: float | None, verdict: dict[str, Any]) -> str:
    return "-" if value is None else _number(value, verdict)


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _interval(found: dict[str, Any] | None, verdict: dict[str, Any], *, value: bool = False) -> str:
    """Return an interval in the unit of the reward, after the value if that is wanted."""
    if found is None:
        return "-"
    lead = f"{_number(found['value'], verdict)} " if value else ""
    if found["low"] is None or found["high"] is None:
        return f"{lead}(no interval)"
    return f"{lead}({_number(found['low'], verdict)}{_TO}{_number(found['high'], verdict)})"


def _ratio(found: dict[str, Any] | None) -> str:
    """Return a value and its interval with three digits."""
    if found is None or found["value"] is None:
        return "-"
    if found["low"] is None or found["high"] is None:
        return f"{found['value']:.3g} (no interval)"
    return f"{found['value']:.3g} ({found['low']:.3g}{_TO}{found['high']:.3g})"
