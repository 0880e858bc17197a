"""Scores with their floors: grades, a verdict in words, and a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from wbdit.evaluation.intervals import Estimate, standard_error
from wbdit.evaluation.registry import GROUPS, Metric

Grade = Literal["at the floor", "close", "apart"]
GRADES: tuple[Grade, ...] = ("at the floor", "close", "apart")
OPPONENTS = {
    "rf_auc_genes": "a random forest",
    "c2st_logistic": "a logistic regression",
    "c2st_trees": "a set of boosted trees",
    "c2st_net": "a neural network",
}
CERTAIN = 3.0  # standard errors from the floor, for a difference that is not chance
SEEN = 3.0  # standard errors of the floor, for a worse set that a metric sees


@dataclass(frozen=True)
class Score:
    """One metric of the synthetic cells with its floor, one value per seed.

    ``n`` is the number of cells per set; ``values``, ``floor_values`` and the intervals are in the order of ``seeds``.
    ``value`` and ``floor`` are means over seeds. ``worse`` has the values of sets that are worse on purpose, by name in
    :data:`wbdit.evaluation.worse.WORSE`.

    Examples
    --------
    >>> from wbdit.evaluation.registry import METRICS
    >>> score = Score(METRICS["w1"], values=(11.0,), floor_values=(10.0,), n=800, seeds=(0,))
    >>> score.ratio, score.grade
    (1.1, 'close')
    """

    metric: Metric
    values: tuple[float, ...]
    floor_values: tuple[float, ...]
    n: int
    seeds: tuple[int, ...]
    intervals: tuple[tuple[float, float] | None, ...] = ()
    floor_intervals: tuple[tuple[float, float] | None, ...] = ()
    worse: dict[str, float] = field(default_factory=dict)
    value: float = field(init=False)
    floor: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", float(np.mean(self.values)))
        object.__setattr__(self, "floor", float(np.mean(self.floor_values)))

    @classmethod
    def of(
        cls,
        metric: Metric,
        synthetic: Sequence[Estimate],
        floor: Sequence[Estimate],
        n: int,
        seeds: tuple[int, ...],
        worse: dict[str, float] | None = None,
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
            worse or {},
        )

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval of the value, or None without one.

        It is the mean of the intervals over seeds. Seeds share most of their cells, so more seeds do not narrow it.
        """
        return self._mean_interval(self.intervals)

    @property
    def floor_interval(self) -> tuple[float, float] | None:
        """95% interval of the floor, as :attr:`interval`."""
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
        """Value over floor; None for metrics compared by difference, and for a floor of 0."""
        sensible = self.metric.compare == "ratio" and self.floor > 1e-12
        return self.value / self.floor if sensible else None

    @property
    def difference(self) -> float:
        """Value minus floor."""
        return self.value - self.floor

    @property
    def excess(self) -> float:
        """Distance from the floor in units of the metric's tolerance; negative for better.

        The grade ``"at the floor"`` ends at 1, and ``"close"`` ends at 2.
        """
        width = self.metric.far - self.metric.near
        if self.metric.compare == "ratio":
            near = self.metric.near - 1
            if self.floor <= 1e-12:
                return 0.0 if self.value <= 1e-12 else math.inf
            worse = self.value / self.floor - 1
        else:
            near = max(self.metric.near, self.metric.chance / math.sqrt(self.n))
            worse = self.metric.loss(self.value) - self.metric.loss(self.floor)
        return worse / near if worse <= near else 1 + (worse - near) / width

    @property
    def error(self) -> float:
        """Standard error of the difference to the floor, from both intervals or, without them, from the seeds."""
        return math.hypot(_error(self.interval, self.spread), self.floor_error)

    @property
    def floor_error(self) -> float:
        """Standard error of the floor; 0 if it is unknown."""
        return _error(self.floor_interval, self.floor_spread)

    @property
    def grade(self) -> Grade:
        """``"at the floor"``, ``"close"`` (slightly worse) or ``"apart"`` (clearly worse).

        A value that is worse than the floor by less than :data:`CERTAIN` standard errors is also ``"at the floor"``:
        with some forty metrics, one real set in twenty would otherwise be called different for one of them.
        """
        worse = self.metric.loss(self.value) - self.metric.loss(self.floor)
        if self.excess <= 1 or worse <= CERTAIN * self.error:
            return "at the floor"
        return "close" if self.excess <= 2 else "apart"

    @property
    def sees(self) -> tuple[str, ...]:
        """Names of the sets that are worse on purpose, and that the metric tells from real cells at this ``n``.

        Empty if the error of the floor is unknown, as for one seed without intervals.
        """
        if not self._knows_error:
            return ()
        limit = self.metric.loss(self.floor) + SEEN * self.floor_error
        return tuple(name for name, value in self.worse.items() if self.metric.loss(value) > limit)

    @property
    def is_blind(self) -> bool:
        """Whether the metric sees none of the sets that are worse on purpose: then its silence means nothing."""
        return bool(self.worse) and self._knows_error and not self.sees

    @property
    def is_unknown(self) -> bool:
        """Whether the score is at the floor by a metric that is blind, which says nothing."""
        return self.is_blind and self.grade == "at the floor"

    @property
    def scaled(self) -> float | None:
        """``(value - bad) / (floor - bad)``, with independent genes per label as the bad set.

        1 is as good as other real cells, 0 is independent genes. None if the metric does not see independent genes,
        or was not computed for them.
        """
        if "independent" not in self.sees:
            return None
        bad = self.metric.loss(self.worse["independent"])
        return (self.metric.loss(self.value) - bad) / (self.metric.loss(self.floor) - bad)

    @property
    def _knows_error(self) -> bool:
        return self.floor_interval is not None or self.floor_spread is not None

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
            "worse": self.worse,
            "sees": list(self.sees),
            "scaled": self.scaled,
            "best": self.metric.best,
            "direction": self.metric.direction,
            "n": self.n,
            "seeds": list(self.seeds),
        }


class Family(NamedTuple):
    """One group of metrics in a line.

    Attributes
    ----------
    title
        Title of the group.
    scaled
        Mean of :attr:`Score.scaled` over the metrics that have one; None if none has.
    n_scaled, n_floor, n_blind, n
        Metrics with a scaled score, at the floor, blind, and all.
    """

    title: str
    scaled: float | None
    n_scaled: int
    n_floor: int
    n_blind: int
    n: int


def families(scores: dict[str, Score]) -> list[Family]:
    """Return a line for each group of metrics, in the order of the report."""
    found = []
    for title, members in by_group(scores).items():
        scaled = [score.scaled for score in members if score.scaled is not None]
        at_floor = sum(score.grade == "at the floor" for score in members)
        blind = sum(score.is_blind for score in members)
        mean = float(np.mean(scaled)) if scaled else None
        found.append(Family(title, mean, len(scaled), at_floor, blind, len(members)))
    return found


@dataclass(frozen=True)
class Verdict:
    """The scores in words.

    ``trust`` lists properties that match real cells, ``caution`` those that differ clearly, ``slight`` those that
    differ slightly, and ``unseen`` what metrics say that see none of the sets that are worse on purpose: with more
    cells they may.
    """

    level: Literal["floor", "close", "mixed", "apart"]
    headline: str
    summary: str
    trust: list[str]
    caution: list[str]
    slight: list[str]
    unseen: list[str] = field(default_factory=list)


HEADLINES = {
    "floor": "These cells cannot be told from real cells",
    "close": "Close to real cells, but measurably different",
    "mixed": "Some properties match real cells, others do not",
    "apart": "These cells differ clearly from real cells",
}


def judge(scores: dict[str, Score], per_type: dict[str, dict[str, Score]]) -> Verdict:
    """Summarize scores in words, by the number of each grade."""
    count = {grade: sum(score.grade == grade for score in scores.values()) for grade in GRADES}
    total = len(scores)
    level: Literal["floor", "close", "mixed", "apart"] = "mixed"
    if count["apart"] > total / 2:
        level = "apart"
    elif count["at the floor"] == total:
        level = "floor"
    elif count["apart"] == 0:
        level = "close"
    parts = [f"{count['at the floor']} of {total} metrics are at the floor set by other real cells"]
    parts += [f"{count['close']} close to it"] if count["close"] else []
    parts += [f"{count['apart']} clearly worse"] if count["apart"] else []
    return Verdict(
        level,
        HEADLINES[level],
        ", ".join(parts) + "." + _odds(scores),
        [score.metric.trust for score in scores.values() if score.grade == "at the floor" and not score.is_blind],
        [_caution(score) for score in scores.values() if score.grade == "apart"] + _weakest_type(per_type),
        [_caution(score) for score in scores.values() if score.grade == "close"],
        [score.metric.trust for score in scores.values() if score.is_unknown],
    )


def format_value(value: float, like: float | None = None) -> str:
    """Format with two to four decimals, fewer for large values; ``like`` sets the size instead of the value.

    Examples
    --------
    >>> format_value(10.456), format_value(0.4567), format_value(0.01234)
    ('10.46', '0.457', '0.0123')
    """
    if not math.isfinite(value):
        return str(value)
    size = abs(value if like is None else like)
    return f"{value:.{2 if size >= 2 else 3 if size >= 0.02 or size == 0 else 4}f}"


def format_pair(score: Score) -> tuple[str, str]:
    """Format value and floor as ``mean ± standard deviation``, with the decimals of the smaller one."""
    like = min(abs(score.value), abs(score.floor))

    def words(mean: float, spread: float | None) -> str:
        return format_value(mean, like) + (f" ± {format_value(spread, like)}" if spread is not None else "")

    return words(score.value, score.spread), words(score.floor, score.floor_spread)


def format_intervals(score: Score) -> tuple[str, str]:
    """Format the 95% intervals of value and floor, rounded as in :func:`format_pair`; "" without one."""
    like = min(abs(score.value), abs(score.floor))

    def words(interval: tuple[float, float] | None) -> str:
        return "" if interval is None else " to ".join(format_value(end, like) for end in interval)

    return words(score.interval), words(score.floor_interval)


def format_against(score: Score) -> str:
    """Format the value relative to its floor: a ratio or a signed difference."""
    return f"{score.ratio:.2f}×" if score.ratio is not None else f"{score.difference:+.3f}"


def format_best(metric: Metric) -> str:
    """Format the best value and the direction.

    Examples
    --------
    >>> from wbdit.evaluation.registry import METRICS
    >>> format_best(METRICS["scc"])
    '1 (higher)'
    """
    way = {"lower": "lower", "higher": "higher", "nearest": "nearest"}[metric.direction]
    return f"{metric.best:g} ({way})"


def format_scaled(scaled: float | None) -> str:
    """Format a scaled score of a metric or a family; "" without one."""
    return "" if scaled is None else f"{scaled:.2f}"


def by_group(scores: dict[str, Score]) -> dict[str, list[Score]]:
    """Return the scores by title of their group, without empty groups."""
    grouped = {title: [s for s in scores.values() if s.metric.group == group] for group, title in GROUPS.items()}
    return {title: members for title, members in grouped.items() if members}


def format_table(scores: dict[str, Score]) -> str:
    """Format a plain-text table with one row per metric, by group."""
    head = ("metric", "synthetic", "95%", "floor", "95%", "against floor", "best", "scaled", "n", "grade")
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
    scaled = format_scaled(score.scaled)
    grade = f"{score.grade} (blind)" if score.is_unknown else score.grade
    return (score.metric.name, value, interval, floor, floor_interval, against, best, scaled, str(score.n), grade)


def _odds(scores: dict[str, Score]) -> str:
    """Describe the classifier that does best in words: an AUC is the frequency of ranking a random pair correctly."""
    classifiers = [score for score in scores.values() if score.metric.name in OPPONENTS]
    if not classifiers:
        return ""
    best = max(classifiers, key=lambda score: score.value)
    return (
        f" Asked which of two cells is synthetic, {OPPONENTS[best.metric.name]} is right {100 * best.value:.0f} times "
        f"in 100. With two sets of real cells, it is right {100 * best.floor:.0f} times; chance is 50."
    )


def _caution(score: Score) -> str:
    like = min(abs(score.value), abs(score.floor))
    detail = f"{score.metric.name} {format_value(score.value, like)}, floor {format_value(score.floor, like)}"
    if score.metric.name == "lfc_slope":
        what = "weaker" if score.value < score.floor else "stronger"
        return f"fold changes between types are {what} than in real cells ({detail})"
    return f"{score.metric.caution} ({detail})"


def _weakest_type(per_type: dict[str, dict[str, Score]]) -> list[str]:
    apart = {name: scores["w2"] for name, scores in per_type.items() if scores["w2"].grade != "at the floor"}
    if not apart:
        return []
    name = max(apart, key=lambda key: apart[key].excess)
    return [f"the least realistic type is {name}: w2 is {format_against(apart[name])} its floor"]


def _error(interval: tuple[float, float] | None, spread: float | None) -> float:
    return standard_error(interval) if interval is not None else spread or 0.0


def _deviation(values: tuple[float, ...]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
