"""Markdown report of a run, red and failed rows first: `python bench/gpu/report.py bench/out/gpu-A.jsonl`."""

from __future__ import annotations

import sys
from pathlib import Path

from rows import Line, describe, read

BASELINES = {"eager fp32": "published, eager fp32", "eager bf16": "published, eager bf16"}


def write_report(path: Path) -> str:
    """Write the report of a file's last run beside it, and return it."""
    text = markdown(list(read(path)))
    path.with_suffix(".md").write_text(text)
    return text


def markdown(lines: list[Line]) -> str:
    """Return the report of a run's lines."""
    card = next((line for line in lines if line["stage"] == "card" and "card" in line), {})
    versions = card.get("versions", {})
    parts = [
        f"# {card.get('card', 'unknown card')}: torch {versions.get('torch')}, triton {card.get('triton')}, "
        f"{card.get('commit')}" + (", quick: a rehearsal, no result" if card.get("quick") else "")
    ]
    wrong = [line for line in lines if "failed" in line or line.get("green") is False]
    absent = [line for line in lines if "absent" in line]
    parts.append("## Red and failed\n\n" + (_list(wrong) or "Nothing."))
    times = {line["stage"]: line["wall"] for line in lines if line["row"] == "whole stage"}
    for stage in dict.fromkeys(line["stage"] for line in lines):
        rows = [line for line in lines if line["stage"] == stage and line["row"] != "whole stage"]
        shown = [line for line in rows if line not in wrong and line not in absent]
        if shown and stage != "card":
            parts.append(f"## {stage.capitalize()} ({times.get(stage, 0):.0f} s)\n\n{_stage(shown, lines)}")
    if absent:
        parts.append("## Absent\n\n" + _list(absent))
    return "\n\n".join(parts) + "\n"


def _list(lines: list[Line]) -> str:
    return "\n".join(f"- {line['stage']}: {line['row']}: {describe(line)}" for line in lines)


def _stage(rows: list[Line], lines: list[Line]) -> str:
    if "table" in rows[0]:
        return "\n\n".join(_profile(row) for row in rows)
    if "task" in rows[0]:
        return _denoisers(rows, lines)
    if not any("seconds" in row or "error" in row for row in rows):
        return "\n".join(f"- {row['row']}: {_facts(row)}" for row in rows)
    return "\n".join(f"- {row['row']}: {describe(row)}" for row in rows)


def _facts(row: Line) -> str:
    hidden = ("run", "stage", "row", "wall")
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in row.items() if key not in hidden)


def _profile(row: Line) -> str:
    head = f"{row['row']}: {row['launches']} launches, {row['kernels_us'] / 1e3:.2f} ms\n\n| kernel | calls | us |"
    table = [f"| `{k['kernel'].replace('|', '/')}` | {k['calls']} | {k['us']:.0f} |" for k in row["table"]]
    return "\n".join([head, "|---|---|---|", *table])


def _denoisers(rows: list[Line], lines: list[Line]) -> str:
    known = {
        (r["config"], r["batch"], r["task"], r["name"]): r["seconds"] for r in lines if "task" in r and "seconds" in r
    }
    head = [
        "model",
        "cells",
        "task",
        "row",
        "ms",
        *(f"times {name}" for name in BASELINES),
        "of its floor",
        "fp64 error",
    ]
    table = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        case = row["config"], row["batch"], row["task"]
        ratios = [known.get((*case, name)) for name in BASELINES.values()]
        cells = (
            *(*case, row["name"], f"{row['seconds'] * 1e3:.2f}"),
            *("" if base is None else f"{base / row['seconds']:.2f}" for base in ratios),
            f"{row['of_floor']:.0%}" if "of_floor" in row else "",
            f"{row['error']:.0e}" if "error" in row else "not checked",
        )
        table.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(table)


def main(arguments: list[str]) -> int:
    """Print the report of a file."""
    if len(arguments) != 1 or not Path(arguments[0]).is_file():
        print("usage: python bench/gpu/report.py FILE.jsonl, a file that bench/gpu.sh wrote", file=sys.stderr)
        return 2
    print(write_report(Path(arguments[0])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
