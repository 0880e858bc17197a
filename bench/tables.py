"""Markdown tables of a run's result."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

Result = dict[str, Any]


def markdown(result: Result) -> str:
    """Return the tables of rows and memory, and one line per absent row."""
    parts = [_head(result)]
    denoisers, operations = (
        [row for row in result["rows"] if row["what"].startswith("op ") == is_op] for is_op in (False, True)
    )
    for config, what in dict.fromkeys((row["config"], row["what"]) for row in denoisers):
        rows = [row for row in denoisers if (row["config"], row["what"]) == (config, what)]
        parts.append(f"### {config}, {what}\n\n" + _denoisers(rows))
    if operations:
        pairs = dict.fromkeys((row["config"], row["what"]) for row in operations)
        by_id = {row["id"]: row for row in operations}
        lines = (_op(config, what, by_id) for config, what in sorted(pairs, key=itemgetter(0)))
        parts.append("### Operations\n\n" + _table(_OP_HEAD, lines))
    if result["memory"]:
        parts.append("### Memory above the starting point\n\n" + _table(_MEMORY_HEAD, map(_memory, result["memory"])))
    lines = [f"{'RED' if gone['failed'] else 'absent'}: {gone['what']}: {gone['why']}" for gone in result["absent"]]
    parts += ["\n".join(lines)] if lines else []
    return "\n\n".join(parts)


def _head(result: Result) -> str:
    machine, versions = result["machine"], result["versions"]
    speeds = ", ".join(
        f"{p['precision']} {p['rows']} x {p['d']}: {p['gflops']:.0f} GFLOP/s" for p in result["products"]
    )
    lines = [
        "",
        f"## {'Quick test run, no result' if result['quick'] else 'Benchmark'}, commit {result['commit']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; {' '.join(machine['flags'])}",
        f"Kernels: {machine['kernels']}",
        f"Python {versions['python']}, torch {versions['torch']}, wbdit {versions['wbdit']}",
        f"torch.mm: {speeds}",
    ]
    return "\n".join(lines)


def _denoisers(rows: list[Result]) -> str:
    head = ("row", "p50", "p20 to p80", "times eager", "of its floor", "fp64 error")
    notes = [f"{row['name']}: {note}" for row in rows if (note := _note(row))]
    return "\n\n".join([_table(head, map(_denoiser, rows)), *notes])


def _denoiser(row: Result) -> tuple[str, ...]:
    seconds = row["seconds"]
    return (
        row["name"],
        _time(seconds["p50"]),
        f"{_time(seconds['p20'])} to {_time(seconds['p80'])}",
        _number(row["ratio_to_eager"], ".2f"),
        _number(row["fraction_of_floor"], ".0%"),
        _number(row.get("error"), ".0e"),
    )


def _note(row: Result) -> str:
    if row.get("ratio_of_kernels"):
        parts = f"{row['ratio_of_sampler']:.2f} from fewer calls x {row['ratio_of_kernels']:.2f} from a faster call"
        return f"{row['ratio_to_eager']:.2f} times = {parts}"
    return row.get("note", "")


_OP_HEAD = ("operation", "shape of", "reference", "kernel", "times reference", "of its floor", "fp64 error")
_MEMORY_HEAD = ("row", "shape of", "what", "MiB", "of eager")


def _op(config: str, what: str, by_id: dict[str, Result]) -> tuple[str, ...]:
    reference, kernel = (by_id.get(f"{config} / {what} / {name}") for name in ("reference", "kernel"))
    times = [_time(row["seconds"]["p50"]) if row else "" for row in (reference, kernel)]
    return (what.removeprefix("op "), config, *times, *(_denoiser(kernel)[3:] if kernel else ("",) * 3))


def _memory(row: Result) -> tuple[str, ...]:
    return (row["name"], row["config"], row["what"], f"{row['mib']:.0f}", _number(row["ratio_to_eager"], ".2f"))


def _table(head, rows) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def _number(value: float | None, layout: str) -> str:
    return "" if value is None else format(value, layout)


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
