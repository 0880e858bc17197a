"""Draw the history: each commit's rows relative to its base, one panel per processor and number of threads.

    python -m bench.gate.chart [LINES.jsonl] [PICTURE.svg]

By default it reads bench/results/gate.jsonl and writes bench/results/gate.svg.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
# readable in print and by the color-blind: hue for the kind of row, shade for the row
PALETTES = {"op": "Greys", "forward": "Blues", "train": "Oranges", "sampling": "Greens"}
MARKERS = "osD^vP*X<>"
INK, MUTED, RED = "#1d1e22", "#5b5f69", "#b02a50"


class LinesError(ValueError):
    """The file is not a history; the message is one line."""


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of full runs, oldest first."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        kept = [line for line in lines if not line["quick"]]
        for line in kept:
            _ = line["commit"], line["processor"], line["threads"], [row["ratio"] for row in line["rows"].values()]
    except OSError as error:
        raise LinesError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LinesError(f"{path}: not a history file of make bench-gate") from error
    if not kept:
        raise LinesError(f"{path}: has only quick runs; add the line of a full run of make bench-gate")
    return kept


def draw(lines: list[dict[str, Any]], picture: Path) -> None:
    """Write the chart of the lines to `picture`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "gate", "font.size": 9, "font.family": "sans-serif"}
    panels: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        panels.setdefault(f"{line['processor']}, {line['threads']} threads", []).append(line)
    width = max(7.5, 4.2 + 0.55 * max(map(len, panels.values())))
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(width, 0.5 + 3.6 * len(panels)), squeeze=False, layout="constrained", sharey=True
    )
    for axis, (title, of_panel) in zip(axes[:, 0], panels.items(), strict=True):
        _panel(axis, title, of_panel)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, metadata={"Date": None})
    plt.close(figure)


def _panel(axis: Any, title: str, lines: list[dict[str, Any]]) -> None:
    axis.axhline(1, color=MUTED, linewidth=0.8, zorder=0)
    for name, style in _styles(dict.fromkeys(name for line in lines for name in line["rows"])).items():
        found = [(x, line["rows"][name]) for x, line in enumerate(lines) if line["rows"].get(name, {}).get("ratio")]
        if not found:
            continue
        axis.plot(*zip(*((x, row["ratio"]) for x, row in found), strict=True), label=name, linewidth=0.8, **style)
        for x, row in found:
            if row["verdict"] in ("RED", "faster"):
                right = x > (len(lines) - 1) / 2
                place = {"xytext": (-9 if right else 9, 0), "ha": "right" if right else "left", "va": "center"}
                axis.annotate(name, (x, row["ratio"]), textcoords="offset points", fontsize=8, color=INK, **place)
        red = [(x, row["ratio"]) for x, row in found if row["verdict"] == "RED"]
        axis.plot(*([p[i] for p in red] for i in (0, 1)), "o", color="none", markeredgecolor=RED, markersize=11)
    axis.set_xticks(range(len(lines)), [line["commit"] for line in lines], rotation=45, ha="right", family="monospace")
    axis.set_xlim(-0.5, len(lines) - 0.5)
    axis.set_ylabel("time / time at the base")
    axis.set_title(f"{title} (circled: red)", loc="left", color=INK, fontsize=10)
    axis.grid(axis="y", color="#dfdcd4", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=7.5)


def _styles(names: dict[str, None]) -> dict[str, dict[str, Any]]:
    """Return each row's color and marker."""
    from matplotlib import colormaps

    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(next((kind for kind in PALETTES if f" {kind} " in f" {name} "), "op"), []).append(name)
    styles = {}
    for kind, rows in kinds.items():
        for number, name in enumerate(rows):
            shade = 0.45 + 0.5 * (number + 1) / len(rows)
            marker = MARKERS[number % len(MARKERS)]
            styles[name] = {"color": colormaps[PALETTES[kind]](shade), "marker": marker, "markersize": 4}
    return {name: styles[name] for name in names}


def main(source: str = str(RESULTS / "gate.jsonl"), target: str = str(RESULTS / "gate.svg")) -> int:
    try:
        draw(read(Path(source)), Path(target))
    except LinesError as error:
        print(f"bench-chart: {error}", file=sys.stderr)
        return 2
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
