"""The gate's result as Markdown tables and as one line of JSON for the history."""

from __future__ import annotations

import dataclasses
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.gate.judge import RED, UNGATED, Absolute, Verdict

FORMAT = 1


def line(
    head: str, base: str, facts: dict[str, Any], rows: list[Verdict], pairs: list[Absolute], seconds: float, quick: bool
) -> dict[str, Any]:
    """Return the history line of a run."""
    return {
        "format": FORMAT,
        "commit": head,
        "base": base,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "processor": facts["machine"]["cpu"],
        "cores": facts["machine"]["cores"],
        "threads": facts["machine"]["threads"],
        "kernels": facts["machine"]["kernels"],
        "torch": facts["versions"]["torch"],
        "quick": quick,
        "seconds": round(seconds),
        "rows": {row.name: _kept(row) for row in rows},
        "operations": {pair.name: _kept(pair) for pair in pairs},
    }


def _kept(verdict: Verdict | Absolute) -> dict[str, Any]:
    fields = dataclasses.asdict(verdict)
    del fields["name"]
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in fields.items()}


def markdown(result: dict[str, Any]) -> str:
    """Return the tables, each with red rows first."""
    title = "Quick test run, no result" if result["quick"] else "Speed gate"
    rows, pairs = result["rows"], result["operations"]
    return "\n".join(
        [
            f"## {title}: {result['commit']} against {result['base']}",
            "",
            f"{result['processor']}, {result['cores']} cores, {result['threads']} threads, "
            f"kernels {result['kernels']}, torch {result['torch']}, {result['seconds']} s",
            "",
            "| row | head / base | A/A spread | red from | |",
            "| --- | --- | --- | --- | --- |",
            *(
                f"| {name} | {_number(row['ratio'], '.3f')} | {_number(row['spread'], '.1%')} "
                f"| {_number(row['threshold'], '.3f')} | {_words(row)} |"
                for name, row in sorted(rows.items(), key=_red_first)
            ),
            "",
            "| operation | reference / kernel | lower quintile | |",
            "| --- | --- | --- | --- |",
            *(
                f"| {name} | {_number(pair['median'], '.2f')} | {_number(pair['lower_quintile'], '.2f')} "
                f"| {_words(pair)} |"
                for name, pair in sorted(pairs.items(), key=_red_first)
            ),
            "",
            summary(result),
        ]
    )


def summary(result: dict[str, Any]) -> str:
    """Return the last line: the names of red and ungated rows."""
    every = [*result["rows"].items(), *((f"{n} (its reference)", found) for n, found in result["operations"].items())]
    red = [name for name, found in every if found["verdict"] == RED]
    ungated = [name for name, found in every if found["verdict"] == UNGATED]
    said = f"RED: {', '.join(red)}" if red else "Nothing is red"
    return f"{said}; {len(ungated)} of {len(every)} ungated{': ' + ', '.join(ungated) if ungated else ''}."


def append(result: dict[str, Any], path: Path) -> None:
    """Append the line to the history file in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")


def append_to_job(text: str) -> None:
    """Append the tables to the summary of a GitHub job, if the gate runs in one."""
    job = os.environ.get("GITHUB_STEP_SUMMARY")
    if job:
        with Path(job).open("a") as file:
            file.write(text + "\n")


def _red_first(item: tuple[str, dict[str, Any]]) -> bool:
    return item[1]["verdict"] != RED


def _words(found: dict[str, Any]) -> str:
    return f"{found['verdict']}: {found['why']}" if found["why"] else found["verdict"]


def _number(value: float | None, layout: str) -> str:
    return "" if value is None else format(value, layout)
