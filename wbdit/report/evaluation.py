"""The report of an evaluation: metrics.json, and a self-contained HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from wbdit._io import write_atomically
from wbdit._outputs import beside_page, check_writable
from wbdit.evaluation.evaluate import Evaluation
from wbdit.evaluation.figure_data import FigureData
from wbdit.evaluation.registry import METRICS, Metric
from wbdit.evaluation.scores import (
    Family,
    Score,
    by_group,
    format_against,
    format_best,
    format_intervals,
    format_pair,
    format_scaled,
)
from wbdit.evaluation.worse import WORSE
from wbdit.report import figures
from wbdit.report.html import render_page
from wbdit.report.summary_png import write_picture

__all__ = ["write_picture", "write_report"]

PAGE, SCORES = "report.html", "metrics.json"

GRADE_MARKS = {"at the floor": "●", "close": "◐", "apart": "○"}
BACKGROUND = "all-cells"


def write_report(
    evaluation: Evaluation, out_dir: str | Path, *, title: str, facts: dict[str, str] | None = None
) -> Path:
    """Write ``metrics.json`` and ``report.html`` into ``out_dir``, which is created if it does not exist.

    Parameters
    ----------
    evaluation
        From :func:`wbdit.evaluation.evaluate.evaluate`.
    title
        Short title of the page.
    facts
        Facts about the run, such as seed, sampler and model hash, in the order of the page.

    Returns
    -------
    The path of ``report.html``, a single file that loads nothing from the network.

    Raises
    ------
    InputError
        If the files cannot be written, or jinja2 or umap-learn is not installed.
    """
    facts = facts or {}
    out = Path(out_dir)
    page = render(evaluation, title=title, facts=facts)
    content = {"title": title, **evaluation.to_dict(), "facts": facts}
    write_atomically(out / PAGE, page)  # first: it marks the folder as ours
    write_atomically(out / SCORES, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return out / PAGE


def check_report(out: Path, *, overwrite: bool = False) -> None:
    """Check early that :func:`write_report` can write into a folder, over a report of wbdit at most.

    Raises
    ------
    InputError
        If it cannot, or would replace files of others; with `overwrite` it may.
    """
    for name in (PAGE, SCORES):
        check_writable(out / name, overwrite=overwrite, is_ours=beside_page(PAGE))


def render(evaluation: Evaluation, *, title: str, facts: dict[str, str]) -> str:
    """Return the page as HTML."""
    data = evaluation.figures
    return render_page(
        "report.html.j2",
        title=title,
        facts=facts,
        evaluation=evaluation,
        verdict=evaluation.verdict,
        seeds=", ".join(map(str, evaluation.seeds)),
        groups={title: [_row(score) for score in rows] for title, rows in by_group(evaluation.scores).items()},
        type_metrics=_type_metrics(evaluation),
        type_rows=[
            (name, {metric: _row(score) for metric, score in row.items()}) for name, row in evaluation.per_type.items()
        ],
        maps=_maps(data),
        panels=_panels(evaluation, data),
        families=[_family(family) for family in evaluation.families],
        worse=[words for _, words in WORSE.values()],
        marks=GRADE_MARKS,
    )


def _row(score: Score) -> dict[str, Any]:
    """Return the table entries of a score."""
    value, floor = format_pair(score)
    interval, floor_interval = format_intervals(score)
    return {
        "metric": score.metric,
        "value": value,
        "floor": floor,
        "interval": interval,
        "floor_interval": floor_interval,
        "short_value": value.split(" ")[0],
        "short_floor": floor.split(" ")[0],
        "against": format_against(score).replace("-", "\N{MINUS SIGN}"),
        "best": format_best(score.metric),
        "scaled": format_scaled(score.scaled).replace("-", "\N{MINUS SIGN}"),
        "is_blind": score.is_blind,
        "grade": score.grade,
        "mark": GRADE_MARKS[score.grade],
        "css": score.grade.split()[0] + (" blind" if score.is_blind else ""),
        "position": f"{100 * _gauge_position(score):.1f}",
        "n": score.n,
    }


def _family(family: Family) -> dict[str, Any]:
    """Return the entries of a family's line; a scaled score is drawn from 0 to 1."""
    scaled = family.scaled
    return {
        "family": family,
        "scaled": format_scaled(scaled).replace("-", "\N{MINUS SIGN}"),
        "width": None if scaled is None else f"{100 * float(np.clip(scaled, 0, 1)):.0f}",
    }


def _type_metrics(evaluation: Evaluation) -> list[Metric]:
    """Return the metrics that at least one type has, in table order."""
    taken = {name for row in evaluation.per_type.values() for name in row}
    return [metric for name, metric in METRICS.items() if name in taken]


def _gauge_position(score: Score) -> float:
    """Return a score's position from 0 to 1 on a gauge with three equal parts: at the floor, close, apart."""
    excess = max(score.excess, 0.0)
    beyond = 2 + (1 - 2 / excess) if excess > 2 else excess  # compress (2, inf) into the last part
    ends = {"at the floor": (0.17, 0.85), "close": (1.15, 1.85), "apart": (2.15, 2.83)}[score.grade]
    return float(np.clip(beyond, *ends)) / 3


def _maps(data: FigureData) -> dict[str, Any]:
    points = figures.fit_map(data.layout)
    maps: dict[str, Any] = {
        "overlay": figures.overlay_map(points, data.is_synthetic),
        "background": figures.dots(points, "background"),
        "background_id": BACKGROUND,
        "types": [],
    }
    if data.labels is None:
        return maps
    types, centers = data.types(), figures.type_centers(data, points)
    for whose, rows in (("real", ~data.is_synthetic), ("synthetic", data.is_synthetic)):
        maps[whose] = figures.type_map(points[rows], data.labels[rows], types, centers, whose)
    maps["types"] = [
        {
            "name": name,
            "number": i + 1,
            "css": figures.color_class(i),
            "real": int(np.sum((data.labels == name) & ~data.is_synthetic)),
            "synthetic": int(np.sum((data.labels == name) & data.is_synthetic)),
            "svg": figures.single_type_map(data, points, name, BACKGROUND),
        }
        for i, name in enumerate(types)
    ]
    return maps


def _panels(evaluation: Evaluation, data: FigureData) -> list[dict[str, Any]]:
    """Return the gene panels, each with its metric; scaled values have no panel of zeros."""
    wanted: list[tuple[str, dict[str, np.ndarray], str, bool]] = [
        ("Mean", data.means, "scc", True),
        ("Variance", data.variances, "var_r2", True),
    ]
    if evaluation.space != "scaled":
        wanted.append(("Fraction of zeros", data.zeros, "zero_mae", False))
    return [
        {"name": name, "svg": figures.gene_panel(values, name.lower(), log=log), "score": evaluation.scores.get(metric)}
        for name, values, metric, log in wanted
    ]
