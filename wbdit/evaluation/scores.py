"""Scores beside their floors, and what they say: grades, a verdict in words, a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from wbdit.evaluation.intervals import Estimate
from wbdit.evaluation.registry import GROUPS, Metric

Grade = Literal["at the floor", "close", "apart"]
GRADES: tuple[Grade, ...] = ("at the floor", "close", "apart")


@dataclass(frozen=True)
class Score:
    """One metric of the synthetic cells beside its floor, a value for each seed.

    ``n`` is the number of cells in each set; ``values``, ``floor_values`` and the intervals follow ``seeds``.
    """

    metric: Metric
    values: tuple[float, ...]
    floor_values: tuple[float, ...]
    n: int
    seeds: tuple[int, ...]
    intervals: tuple[tuple[float, float] | None, ...] = ()
    floor_intervals: tuple[tuple[float, float] | None, ...] = ()
    value: float = field(init=False)
    floor: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", float(np.mean(self.values)))
        object.__setattr__(self, "floor", float(np.mean(self.floor_values)))

    @classmethod
    def of(
        cls, metric: Metric, synthetic: Sequence[Estimate], floor: Sequence[Estimate], n: int, seeds: tuple[int, ...]
    ) -> Score:
        """Gather the estimates of all seeds."""
        return cls(
            metric,
            tuple(each.value for each in synthetic),
            tuple(each.value for each in floor),
            n,
            seeds,
            tuple(each.interval for each in synthetic),
            tuple(each.interval for each in floor),
        )

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the value, None where there is none.

        The mean of the seeds' intervals: seeds share most of their cells, so more of them do not narrow it.
        """
        return self._mean_interval(self.intervals)

    @property
    def floor_interval(self) -> tuple[float, float] | None:
        """95 % interval of the floor, as :attr:`interval`."""
        return self._mean_interval(self.floor_intervals)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds, None for a single seed."""
        return _deviation(self.values)

    @property
    def floor_spread(self) -> float | None:
        """Standard deviation of the floor over the seeds, None for a single seed."""
        return _deviation(self.floor_values)

    @property
    def ratio(self) -> float | None:
        """Value over floor, where that makes sense."""
        sensible = self.metric.compare == "ratio" and self.floor > 1e-12
        return self.value / self.floor if sensible else None

    @property
    def difference(self) -> float:
        """Value minus floor."""
        return self.value - self.floor

    @property
    def excess(self) -> float:
        """How much worse than the floor, below 0 for better.

        1 is where ``"at the floor"`` ends, 2 where ``"close"`` ends.
        """
        width = self.metric.far - self.metric.near
        if self.metric.compare == "ratio":
            near = self.metric.near - 1
            if self.floor <= 1e-12:
                return 0.0 if self.value <= 1e-12 else math.inf
            worse = self.value / self.floor - 1
        else:
            near = max(self.metric.near, self.metric.chance / math.sqrt(self.n))
            worse = self._loss(self.value) - self._loss(self.floor)
        return worse / near if worse <= near else 1 + (worse - near) / width

    @property
    def grade(self) -> Grade:
        """``"at the floor"`` (also within two standard deviations of it), ``"close"`` or ``"apart"``."""
        if self.excess <= 1 or abs(self.difference) <= 2 * (self.floor_spread or 0.0):
            return "at the floor"
        return "close" if self.excess <= 2 else "apart"

    def _loss(self, value: float) -> float:
        """Return the distance from the best value, to one side only unless ``direction`` is ``"nearest"``."""
        away = {"lower": value - self.metric.best, "higher": self.metric.best - value}
        return max(away[self.metric.direction], 0.0) if self.metric.direction in away else abs(value - self.metric.best)

    def _mean_interval(self, intervals: tuple[tuple[float, float] | None, ...]) -> tuple[float, float] | None:
        known = [interval for interval in intervals if interval is not None]
        if not known or len(known) < len(intervals):
            return None
        low, high = np.clip(np.mean(known, axis=0), self.metric.low, self.metric.high)
        return float(low), float(high)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "value": self.value,
            "interval": self.interval,
            "spread": self.spread,
            "values": list(self.values),
            "floor": self.floor,
            "floor_interval": self.floor_interval,
            "floor_spread": self.floor_spread,
            "floor_values": list(self.floor_values),
            "ratio": self.ratio,
            "difference": self.difference,
            "grade": self.grade,
            "best": self.metric.best,
            "direction": self.metric.direction,
            "n": self.n,
            "seeds": list(self.seeds),
        }


@dataclass(frozen=True)
class Verdict:
    """The scorecard in plain words: a headline, what it rests on, what can be trusted and what cannot."""

    level: Literal["floor", "close", "mixed", "apart"]
    headline: str
    summary: str
    trust: list[str]
    caution: list[str]


HEADLINES = {
    "floor": "By every measure here, these cells pass for real ones",
    "close": "Close to real cells, and measurably not the same",
    "mixed": "Some of this can be trusted, some of it cannot",
    "apart": "Do not take these cells for real ones",
}


def judge(scores: dict[str, Score], per_type: dict[str, dict[str, Score]]) -> Verdict:
    """Turn scores into words, by how many are at the floor, close to it, or apart from it."""
    count = {grade: sum(score.grade == grade for score in scores.values()) for grade in GRADES}
    total = len(scores)
    level: Literal["floor", "close", "mixed", "apart"] = "mixed"
    if count["apart"] > total / 2:
        level = "apart"
    elif count["at the floor"] == total:
        level = "floor"
    elif count["apart"] == 0:
        level = "close"
    parts = [f"{count['at the floor']} of {total} measures stand where other real cells stand"]
    parts += [f"{count['close']} close to it"] if count["close"] else []
    parts += [f"{count['apart']} clearly apart"] if count["apart"] else []
    return Verdict(
        level,
        HEADLINES[level],
        ", ".join(parts) + "." + _odds(scores),
        [score.metric.trust for score in scores.values() if score.grade == "at the floor"],
        [_caution(score) for score in scores.values() if score.grade != "at the floor"] + _weakest_type(per_type),
    )


def format_value(value: float, like: float | None = None) -> str:
    """Return two to four decimals, as papers print them: as many as ``like`` (or the value itself) needs."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value if like is None else like)
    return f"{value:.{2 if size >= 2 else 3 if size >= 0.02 or size == 0 else 4}f}"


def format_pair(score: Score) -> tuple[str, str]:
    """Return ``mean ± spread`` of the value and of the floor, with as many decimals as the smaller needs."""
    like = min(abs(score.value), abs(score.floor))

    def words(mean: float, spread: float | None) -> str:
        return format_value(mean, like) + (f" ± {format_value(spread, like)}" if spread is not None else "")

    return words(score.value, score.spread), words(score.floor, score.floor_spread)


def format_intervals(score: Score) -> tuple[str, str]:
    """Return the 95 % intervals of the value and of the floor, as :func:`format_pair` rounds; "" for none."""
    like = min(abs(score.value), abs(score.floor))

    def words(interval: tuple[float, float] | None) -> str:
        return "" if interval is None else " to ".join(format_value(end, like) for end in interval)

    return words(score.interval), words(score.floor_interval)


def format_against(score: Score) -> str:
    """Return how the value stands to its floor: a ratio or a signed difference."""
    return f"{score.ratio:.2f}×" if score.ratio is not None else f"{score.difference:+.3f}"


def format_best(metric: Metric) -> str:
    """Return the best value and where to look for it."""
    way = {"lower": "lower", "higher": "higher", "nearest": "nearest"}[metric.direction]
    return f"{metric.best:g} ({way})"


def by_group(scores: dict[str, Score]) -> dict[str, list[Score]]:
    """Return the scores under the titles of their groups, empty groups left out."""
    grouped = {title: [s for s in scores.values() if s.metric.group == group] for group, title in GROUPS.items()}
    return {title: members for title, members in grouped.items() if members}


def format_table(scores: dict[str, Score]) -> str:
    """Return aligned plain text, a row a metric, group by group."""
    head = ("metric", "synthetic", "95 %", "floor", "95 %", "against floor", "best", "n", "reading")
    grouped = {title: [_table_row(score) for score in members] for title, members in by_group(scores).items()}
    rows = [head, *(row for members in grouped.values() for row in members)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

    lines = [line(head), line(["-" * width for width in widths])]
    for title, members in grouped.items():
        lines += ["", f"[{title}]", *map(line, members)]
    return "\n".join(lines)


def _table_row(score: Score) -> tuple[str, ...]:
    (value, floor), (interval, floor_interval) = format_pair(score), format_intervals(score)
    against, best = format_against(score), format_best(score.metric)
    return (score.metric.name, value, interval, floor, floor_interval, against, best, str(score.n), score.grade)


def _odds(scores: dict[str, Score]) -> str:
    """Return the hardest test in plain words; an AUC is exactly this frequency."""
    if "rf_auc_genes" not in scores:
        return ""
    score = scores["rf_auc_genes"]
    return (
        f" Asked which of two cells is synthetic, a random forest is right {100 * score.value:.0f} times in 100; "
        f"between two sets of real cells, {100 * score.floor:.0f} times (a coin: 50)."
    )


def _caution(score: Score) -> str:
    slightly = ", slightly" if score.grade == "close" else ""
    like = min(abs(score.value), abs(score.floor))
    detail = f"{score.metric.name} {format_value(score.value, like)}, floor {format_value(score.floor, like)}"
    if score.metric.name == "lfc_slope":
        what = "weaker" if score.value < score.floor else "stronger"
        return f"fold changes between types are {what} than in real cells{slightly} ({detail})"
    return f"{score.metric.caution}{slightly} ({detail})"


def _weakest_type(per_type: dict[str, dict[str, Score]]) -> list[str]:
    apart = {name: scores["w2"] for name, scores in per_type.items() if scores["w2"].grade != "at the floor"}
    if not apart:
        return []
    name = max(apart, key=lambda key: apart[key].excess)
    return [f"the weakest type is {name}: w2 {format_against(apart[name])} its floor"]


def _deviation(values: tuple[float, ...]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
