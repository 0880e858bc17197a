"""What each metric means, what is best, and what its distance from the real-against-real floor says."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Grade = Literal["at the floor", "close", "apart"]
GRADES: tuple[Grade, ...] = ("at the floor", "close", "apart")


@dataclass(frozen=True)
class Metric:
    """A metric and how to read it.

    ``near`` and ``far`` are reading aids, not tests: how much worse than the floor a value may be and still
    count as ``"at the floor"`` or ``"close"``. They are ratios to the floor where ``compare`` is ``"ratio"``,
    differences otherwise. Few cells make some metrics jump by chance: ``near`` is then ``chance / sqrt(n)``,
    about two standard errors, where that is more.
    """

    name: str
    title: str
    family: str
    best: float
    direction: Literal["lower", "higher", "nearest"]
    compare: Literal["ratio", "difference"]
    near: float
    far: float
    sentence: str
    trust: str
    caution: str
    chance: float = 0.0


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "w1", "Wasserstein-1", "CFGen", 0.0, "lower", "ratio", 1.05, 1.15,
            "How far, on average, cells must be moved to turn one set into the other (30 principal components).",
            "cells lie where real cells lie", "cells lie away from where real cells lie",
        ),
        Metric(
            "w2", "Wasserstein-2", "CFGen", 0.0, "lower", "ratio", 1.05, 1.15,
            "The same with squared distances, so that outlying cells weigh more.",
            "no cells stray further than real ones do", "some cells stray far from the real ones",
        ),
        Metric(
            "mmd_cfgen", "MMD, fixed widths", "CFGen", 0.0, "lower", "ratio", 1.3, 2.5,
            "How differently dense the two sets are, on five fixed length scales (30 principal components).",
            "cells are as dense as real ones everywhere", "cells crowd and thin out in other places than real ones",
        ),
        Metric(
            "mmd_scdiffusion", "MMD, data widths", "scDiffusion", 0.0, "lower", "ratio", 1.5, 3.0,
            "The same on length scales taken from the cells (50 joint components): sensitive to a common shift.",
            "the cloud as a whole is in place", "the cloud as a whole is shifted or misshapen",
        ),
        Metric(
            "rf_auc", "Forest on components", "scDiffusion", 0.5, "lower", "difference", 0.06, 0.2,
            "How well a random forest tells synthetic from real by 50 components: 0.5 is a coin toss, 1 is always.",
            "a forest cannot tell them by their principal components", "a forest tells them by their components", 1.6,
        ),
        Metric(
            "rf_auc_genes", "Forest on genes", "scDiffusion", 0.5, "lower", "difference", 0.06, 0.2,
            "The same on the genes themselves: the hardest test here, it sees zeros and whole numbers.",
            "a forest cannot tell them even by single genes", "a forest tells them by single genes", 1.6,
        ),
        Metric(
            "scc", "Gene means, rank", "scDiffusion", 1.0, "higher", "difference", 0.01, 0.05,
            "Whether the genes' mean expression comes in the real order (Spearman correlation).",
            "genes have their real mean expression", "some genes are expressed too much or too little",
        ),
        Metric(
            "var_r2", "Gene variances", "", 1.0, "higher", "difference", 0.025, 0.12,
            "How much of the genes' variance is reproduced (coefficient of determination, 1 is all of it).",
            "genes vary as much as they should", "genes vary too little or too much",
        ),
        Metric(
            "zero_mae", "Zero fractions", "", 0.0, "lower", "ratio", 1.25, 2.5,
            "How far the share of cells without a gene is off, averaged over genes.",
            "genes are absent as often as they should be", "genes are absent too often or too rarely",
        ),
        Metric(
            "lfc_slope", "Fold changes", "", 1.0, "nearest", "difference", 0.06, 0.15,
            "Generated against real log fold changes between types: under 1, the types differ too little.",
            "types differ as strongly as they should", "the differences between types have the wrong strength", 1.2,
        ),
        Metric(
            "tstr", "Train synthetic, test real", "", 1.0, "higher", "difference", 0.04, 0.12,
            "Accuracy on real cells of a label classifier that saw synthetic cells only; the floor saw real ones.",
            "labels learned from them hold for real cells", "labels learned from them fail on real cells", 1.0,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Score:
    """One metric of the synthetic cells beside its floor, a value for each seed.

    ``n`` is the number of cells in each set; ``values`` and ``floor_values`` follow ``seeds``.
    """

    metric: Metric
    values: tuple[float, ...]
    floor_values: tuple[float, ...]
    n: int
    seeds: tuple[int, ...]
    value: float = field(init=False)
    floor: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", float(np.mean(self.values)))
        object.__setattr__(self, "floor", float(np.mean(self.floor_values)))

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

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "value": self.value,
            "spread": self.spread,
            "values": list(self.values),
            "floor": self.floor,
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


def format_against(score: Score) -> str:
    """Return how the value stands to its floor: a ratio or a signed difference."""
    return f"{score.ratio:.2f}×" if score.ratio is not None else f"{score.difference:+.3f}"


def format_best(metric: Metric) -> str:
    """Return the best value and where to look for it."""
    way = {"lower": "lower", "higher": "higher", "nearest": "nearest"}[metric.direction]
    return f"{metric.best:g} ({way})"


def format_table(scores: dict[str, Score]) -> str:
    """Return aligned plain text, a row a metric."""
    head = ("metric", "synthetic", "floor", "against floor", "best", "n", "reading")
    rows = [
        (
            name,
            *format_pair(score),
            format_against(score),
            format_best(score.metric),
            str(score.n),
            score.grade,
        )
        for name, score in scores.items()
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


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
