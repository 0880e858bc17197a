"""Synthetic cells beside real ones: every metric with its real-against-real floor."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import anndata as ad
from tqdm import tqdm

from wbdit._version import installed_version
from wbdit.data.expression import Space
from wbdit.errors import InputError, need_extra
from wbdit.evaluation.align import Aligned, align
from wbdit.evaluation.compare import MIN_CELLS, MIN_PER_TYPE, STAGES_PER_SEED, Comparison, Plan, SeedRun, run_seed
from wbdit.evaluation.estimators import Estimates
from wbdit.evaluation.figure_data import FigureData
from wbdit.evaluation.intervals import Estimate
from wbdit.evaluation.registry import METRICS
from wbdit.evaluation.scores import Score, Verdict, format_table, judge

TRAIN_FLOOR = "real training cells against real held-out cells"
HALVES_FLOOR = "one random half of the real cells against the other half"
PACKAGES = ("wbdit", "numpy", "scipy", "scikit-learn", "anndata", "scanpy", "POT", "umap-learn")


@dataclass(frozen=True)
class Evaluation:
    """Synthetic cells scored against real ones.

    Attributes
    ----------
    scores
        Overall, by metric.
    per_type
        By label, what few cells can tell: ``w1``, ``w2``, ``mmd_cfgen``, ``scc``, ``zero_mae`` and ``library_w1``, each
        with its own floor and n.
    omitted
        Why a metric is not there.
    notes
        What was done to the cells, and what to keep in mind.
    n, seeds
        Cells in each set, and the seeds that drew them.
    floor
        What the floor is made of, in words.
    """

    scores: dict[str, Score]
    per_type: dict[str, dict[str, Score]]
    omitted: dict[str, str]
    notes: list[str]
    n: int
    seeds: tuple[int, ...]
    n_genes: int
    n_shared_genes: int
    space: Space
    floor: str
    versions: dict[str, str]
    figures: FigureData = field(repr=False)

    @cached_property
    def verdict(self) -> Verdict:
        """The scorecard in plain words."""
        return judge(self.scores, self.per_type)

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into ``metrics.json``: plain values, no arrays."""
        described = {
            name: {"title": score.metric.title, "group": score.metric.group, "family": score.metric.family}
            | score.to_dict()
            | {"sentence": score.metric.sentence}
            for name, score in self.scores.items()
        }
        types = {name: {key: score.to_dict() for key, score in row.items()} for name, row in self.per_type.items()}
        return {
            "verdict": {
                "level": self.verdict.level,
                "headline": self.verdict.headline,
                "summary": self.verdict.summary,
            },
            "n": self.n,
            "seeds": list(self.seeds),
            "n_genes": self.n_genes,
            "n_shared_genes": self.n_shared_genes,
            "space": self.space,
            "floor": self.floor,
            "metrics": described,
            "per_type": types,
            "omitted": self.omitted,
            "notes": self.notes,
            "versions": self.versions,
        }

    def table(self) -> str:
        """Return aligned plain text: a row a metric, what was left out, n and the seeds."""
        seeds = ", ".join(map(str, self.seeds))
        lines = [
            self.verdict.headline + ": " + self.verdict.summary,
            "",
            format_table(self.scores),
            "",
            f"n = {self.n} cells of each set, {self.n_genes} genes, seeds {seeds}; floor: {self.floor}",
        ]
        return "\n".join(lines + [f"{name} is left out: {reason}" for name, reason in self.omitted.items()])


def evaluate(
    real: ad.AnnData,
    synthetic: ad.AnnData,
    *,
    train: ad.AnnData | None = None,
    label: str | None = None,
    n_cells: int = 1000,
    n_genes: int = 2000,
    seeds: Sequence[int] = (0, 1, 2),
    bootstrap: int = 200,
    ignore: Sequence[str] = (),
    progress: bool = True,
) -> Evaluation:
    """Compare synthetic cells with held-out real ones, every metric beside its floor.

    The floor is the same code on real training cells against real held-out cells, at the same number of cells and
    the same seeds. Without training cells each seed splits the real cells into two halves (by label, if given): one is
    the reference for both, the other makes the floor.

    Parameters
    ----------
    real
        Held-out cells, which the generator has not seen.
    synthetic
        Generated cells.
    train
        The cells that the generator was trained on; without them nothing is said of memorization.
    label
        Column of ``obs`` with the labels, in every set.
    n_cells
        Most cells to draw of each set; all sets are drawn equally large.
    n_genes
        Most variable genes to use.
    seeds
        Each draws (and splits) anew.
    bootstrap
        Resamples for the 95 % intervals, 0 for none: halves without replacement, see :mod:`wbdit.evaluation.intervals`.
    ignore
        Labels that are no type, such as ``"unassigned"``: their cells stay out of the metrics by label and of
        ``lfc_slope`` and ``tstr``, not out of the others.
    progress
        Show a bar on stderr.

    Raises
    ------
    InputError
        Cells that cannot be used or compared; the message says why.
    """
    seeds = tuple(int(seed) for seed in seeds)
    if not seeds or min(seeds) < 0 or n_cells < MIN_CELLS or n_genes < 2:
        raise InputError(f"needed: one seed or more (0 or above), n_cells of {MIN_CELLS} or more, n_genes of 2 or more")
    if bootstrap < 0 or bootstrap == 1:
        raise InputError(f"bootstrap is 0 for no intervals, or 2 resamples or more, not {bootstrap}")
    sets = {"real": real, "synthetic": synthetic} | ({} if train is None else {"train": train})
    aligned = align(sets, label=label, n_genes=n_genes)
    n = _equal_size(aligned, n_cells)
    plan = Plan(n, n_cells, bootstrap, _ignored(aligned, label, ignore))
    notes = [*aligned.notes, *_cautions(aligned, plan, label)]
    # threads gain little on matrices this small, and lose a lot where other programs share the cores
    with _one_blas_thread(), _progress_bar(len(seeds) * STAGES_PER_SEED, progress) as announce:
        runs = [run_seed(aligned, plan, seed, announce) for seed in seeds]
    parts = {"overall": [run.overall for run in runs], "memory": [run.memory for run in runs]}
    omitted = {name: reason for rows in parts.values() for row in rows for name, reason in row.omitted.items()}
    found = {name: score for rows in parts.values() for name, score in _scores(rows, seeds, bootstrap > 0).items()}
    per_type = _type_scores(runs, seeds, bootstrap > 0)
    if few := sorted(_label_names(aligned)["real"] - set(per_type) - set(plan.ignored)):
        notes.append(f"not scored by type, with fewer than {MIN_PER_TYPE} cells in a set: {', '.join(few)}")
    return Evaluation(
        scores={name: found[name] for name in METRICS if name in found},
        per_type=per_type,
        omitted=omitted,
        notes=notes,
        n=n,
        seeds=seeds,
        n_genes=len(aligned.genes),
        n_shared_genes=aligned.n_shared_genes,
        space=aligned.space,
        floor=HALVES_FLOOR if train is None else TRAIN_FLOOR,
        versions={name: installed_version(name) for name in PACKAGES},
        figures=runs[0].figures,
    )


def _equal_size(aligned: Aligned, n_cells: int) -> int:
    """Return the size that every set can give; the real cells count half where they must make their own floor."""
    sizes = {name: len(cells) for name, cells in aligned.sets.items()}
    shares = sizes if "train" in sizes else sizes | {"real": sizes["real"] // 2}
    smallest = min(shares, key=lambda name: shares[name])
    if shares[smallest] < MIN_CELLS:
        needed = MIN_CELLS if smallest != "real" or "train" in sizes else 2 * MIN_CELLS
        raise InputError(f"too few {smallest} cells: {sizes[smallest]}, at least {needed} are needed")
    return min(n_cells, shares[smallest])


def _ignored(aligned: Aligned, label: str | None, ignore: Sequence[str]) -> tuple[str, ...]:
    """Return the labels to ignore; refuse those that no cell has."""
    ignored = tuple(dict.fromkeys(map(str, ignore)))
    if ignored and label is None:
        raise InputError(f"labels to ignore ({', '.join(ignored)}) need a label column: name it")
    known = set().union(*_label_names(aligned).values())
    if unknown := [name for name in ignored if name not in known]:
        raise InputError(
            f"no cell is labeled {unknown[0]!r}, to be ignored; the labels are: {', '.join(sorted(known))}"
        )
    return ignored


def _cautions(aligned: Aligned, plan: Plan, label: str | None) -> list[str]:
    """Return what a reader of the figures should keep in mind; refuse sets without a label in common."""
    notes = []
    whole = [name for name, cells in aligned.sets.items() if len(cells) == plan.n]
    if whole:
        notes.append(
            f"every seed draws all of the {' and '.join(whole)} cells, so the spread over the seeds understates chance"
        )
    if label is None:
        return notes
    if plan.ignored:
        notes.append(f"left out of everything taken by label: cells labeled {', '.join(plan.ignored)}")
    found = {name: names - set(plan.ignored) for name, names in _label_names(aligned).items()}
    for name, names in found.items():
        if not names & found["real"]:
            raise InputError(f"real and {name} cells have no label of {label!r} in common")
        if absent := sorted(found["real"] - names):
            notes.append(f"{name} cells lack these labels: {', '.join(absent)}")
        if new := sorted(names - found["real"]):
            notes.append(f"{name} cells have labels that the real ones lack: {', '.join(new)}")
    return notes


def _label_names(aligned: Aligned) -> dict[str, set[str]]:
    """Return the labels in each set; none where no label column was given."""
    return {name: set(() if cells.labels is None else map(str, cells.labels)) for name, cells in aligned.sets.items()}


def _scores(runs: Sequence[Comparison], seeds: tuple[int, ...], with_intervals: bool) -> dict[str, Score]:
    """Return a score for each metric that every seed could take, of the synthetic cells and of the floor."""

    def seen(estimates: Estimates, name: str) -> Estimate:
        return estimates[name] if with_intervals else Estimate(estimates[name].value)

    taken = [name for name in runs[0].synthetic if all(name in run.synthetic and name in run.floor for run in runs)]
    return {
        name: Score.of(
            METRICS[name],
            [seen(run.synthetic, name) for run in runs],
            [seen(run.floor, name) for run in runs],
            min(run.n for run in runs),
            seeds,
        )
        for name in taken
        if not any(name in run.omitted for run in runs)
    }


def _type_scores(runs: list[SeedRun], seeds: tuple[int, ...], with_intervals: bool) -> dict[str, dict[str, Score]]:
    """Return scores by type, for types that every seed could score."""
    scored = [name for name in runs[0].per_type if all(name in run.per_type for run in runs)]
    return {name: _scores([run.per_type[name] for run in runs], seeds, with_intervals) for name in scored}


@contextmanager
def _progress_bar(total: int, show: bool) -> Iterator[Callable[[str], None]]:
    """Yield a function that names the stage which begins, and counts the one before as done."""
    with tqdm(total=total, desc="evaluate", unit="stage", file=sys.stderr, disable=not show) as bar:
        done = -1

        def announce(stage: str) -> None:
            nonlocal done
            done += 1
            bar.n = done
            bar.set_description(f"evaluate, {stage}")

        yield announce
        bar.n = total
        bar.set_description("evaluate, done")


def _one_blas_thread() -> AbstractContextManager[object]:
    try:
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
    except ImportError:
        raise need_extra("scikit-learn") from None
    return threadpool_limits(1, user_api="blas")
