"""Markdown tables of the results: one table per data set, one row per metric, one column per peer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from wbdit.evaluation.registry import METRICS
from wbdit.evaluation.scores import format_value

Result = dict[str, Any]
OURS = "wbdit"


def markdown(results: Sequence[Result]) -> str:
    """Return a table for each data set, with its cells, machine and commits."""

    def data(result: Result) -> tuple[str, str]:
        return result["about"]["name"], result["settings"]["data"]

    return "\n\n".join(_data_set(list(group)) for _, group in groupby(sorted(results, key=data), data)) + "\n"


def _data_set(results: list[Result]) -> str:
    peers: dict[str, list[Result]] = {}
    for result in results:
        peers.setdefault(result["settings"]["peer"], []).append(result)
    seeds = sorted({result["settings"]["seed"] for result in results})
    columns = list(peers.values())
    head = ["measure", "floor", *(_title(column, seeds) for column in columns)]
    most = max(columns, key=len)  # the floor is the same for all peers of a seed
    rows = [
        [f"`{name}`", _cell(most, lambda r, name=name: _score(r, name, "floor"))]
        + [_cell(column, lambda r, name=name: _score(r, name, "value")) for column in columns]
        for name in METRICS
        if any(name in result["scores"]["metrics"] for result in results)
    ]
    for label, fact in (("training, s", "seconds_to_train"), ("generating, s", "seconds_to_generate")):
        rows.append(
            [label, "", *(_cell(column, lambda r, fact=fact: r["facts"][fact], "{:.3g}") for column in columns)]
        )
    rows.append(
        ["parameters", "", *(_cell(column, lambda r: r["facts"]["parameters"], "{:,.0f}") for column in columns)]
    )
    table = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    behind = [line for name, column in peers.items() if name != OURS and (line := _behind(peers.get(OURS, []), column))]
    return "\n".join([*_what(results, seeds), "", *behind, *([""] if behind else []), *table, "", *_rests_on(results)])


def _behind(ours: list[Result], theirs: list[Result]) -> str:
    """Return a line on the metrics in which wbdit is farther from the floor than a peer, beyond noise; "" if unknown.

    Better than the floor does not count. Noise is two standard errors of the differences between seeds' pairs.
    """
    pairs = [(a, b) for a in ours for b in theirs if a["settings"]["seed"] == b["settings"]["seed"]]
    if len(pairs) < 2:
        return ""
    found = []
    for name in METRICS:
        gaps = np.array([[_shortfall(result, name) for result in pair] for pair in pairs], dtype=float)
        differences = gaps[:, 0] - gaps[:, 1]
        if differences.mean() > 2 * differences.std(ddof=1) / len(pairs) ** 0.5:
            found.append(f"`{name}`")
    return f"- wbdit is behind {theirs[0]['title']}: {', '.join(found) or 'in no measure'}"


def _shortfall(result: Result, name: str) -> float:
    """Return how much farther from the best value than the floor; NaN without a score."""
    value, floor = (_score(result, name, which) for which in ("value", "floor"))
    if value is None or floor is None:
        return float("nan")
    metric = METRICS[name]
    return max(metric.loss(value) - metric.loss(floor), 0.0)


def _what(results: list[Result], seeds: list[int]) -> list[str]:
    about, settings = results[0]["about"], results[0]["settings"]
    n = _several(result["scores"]["n"] for result in results)
    minutes = _several(f"{result['settings']['minutes']:g}" for result in results)
    return [
        f"### {about['name']}",
        "",
        f"{about['n_train']:,} cells to train on, {about['n_test']:,} held out, {about['n_genes']:,} genes, labels "
        f"{' and '.join(settings['labels'])}; n = {n}, at most {minutes} minutes of training; mean and standard "
        f"deviation over seeds {', '.join(map(str, seeds))}, each with its own split, training and generated cells.",
    ]


def _rests_on(results: list[Result]) -> list[str]:
    """Return a line on what the numbers depend on: the cells left out, the machine, the code."""
    notes = dict.fromkeys(note for result in results for note in result["about"]["notes"])
    facts = [result["facts"] for result in results]
    machines = _several(f"{fact['machine']['threads']} threads, {fact['machine']['kernels']}" for fact in facts)
    commits = _several(fact["commit"] for fact in facts)
    return [f"{'; '.join(notes) or 'All cells are used'}. Made on {machines}; commit {commits}."]


def _title(column: list[Result], seeds: list[int]) -> str:
    missing = "" if len(column) == len(seeds) else f" ({len(column)} of {len(seeds)} seeds)"
    return column[0]["title"] + missing


def _score(result: Result, name: str, which: str) -> float | None:
    return result["scores"]["metrics"].get(name, {}).get(which)


def _cell(column: list[Result], of: Callable[[Result], float | None], layout: str = "") -> str:
    """Return ``mean ± standard deviation`` over seeds, the mean alone for one; empty if a seed has no value."""
    values = [of(result) for result in column]
    if any(value is None for value in values):
        return ""
    mean = float(np.mean(values))

    def shown(value: float) -> str:
        return layout.format(value) if layout else format_value(value, mean)

    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return shown(mean) if spread == 0 else f"{shown(mean)} ± {shown(spread)}"


def _several(values: Iterable[Any]) -> str:
    return " and ".join(dict.fromkeys(map(str, values)))
