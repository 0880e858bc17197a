"""Evaluation of synthetic cells against real cells: every metric with its real-against-real floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from itertools import count
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from wbdit._progress import progress_bar
from wbdit._version import installed_version
from wbdit.data.matrix import Source
from wbdit.data.space import Space
from wbdit.errors import InputError, need_extra
from wbdit.evaluation.align import Aligned, align
from wbdit.evaluation.classifiers import Giveaway
from wbdit.evaluation.compare import (
    MIN_CELLS,
    MIN_PER_TYPE,
    MOST_CELLS,
    STAGES_ONCE,
    STAGES_PER_SEED,
    Comparison,
    Plan,
    SeedRun,
    halves_of,
    run_seed,
    score_donors,
)
from wbdit.evaluation.estimators import Estimates
from wbdit.evaluation.figure_data import FigureData
from wbdit.evaluation.intervals import Estimate
from wbdit.evaluation.registry import METRICS
from wbdit.evaluation.scores import Family, Score, Verdict, families, format_table, judge

TRAIN_FLOOR = "real training cells against real held-out cells"
HALVES_FLOOR = "one random half of the real cells against the other half"
ON_REQUEST = "takes long: ask for it with `full` (--full)"
PACKAGES = ("wbdit", "numpy", "scipy", "scikit-learn", "anndata", "scanpy", "POT", "umap-learn")


@dataclass(frozen=True)
class Evaluation:
    """Synthetic cells scored against real ones.

    Attributes
    ----------
    scores
        Scores over all cells, by metric.
    per_type
        Scores by label and metric, for metrics that need few cells: ``w1``, ``w2``, ``mmd_cfgen``, ``scc``,
        ``zero_mae`` and ``library_w1``. Each type has its own floor and n.
    omitted
        The reason for each metric that was not computed.
    notes
        Preprocessing steps, and cautions for the interpretation.
    n, seeds
        Number of cells per set, and the seeds of the draws.
    n_genes, n_shared_genes, space
        Numbers of genes used and shared by all sets, and the expression space that was found.
    floor
        Description of the floor.
    versions
        Versions of the packages that were used.
    giveaways
        Genes that tell synthetic from real cells best, each on its own.
    figures
        Data of the first seed for the figures.
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
    giveaways: list[Giveaway]
    figures: FigureData = field(repr=False)

    @cached_property
    def verdict(self) -> Verdict:
        """The scores in plain words."""
        return judge(self.scores, self.per_type)

    @property
    def families(self) -> list[Family]:
        """One line for each group of metrics."""
        return families(self.scores)

    def to_frame(self) -> pd.DataFrame:
        """Return a table with one row per metric, in the order of the report.

        Examples
        --------
        >>> quick = dict(n_cells=30, n_genes=50, seeds=(0,), bootstrap=4, progress=False)
        >>> frame = wbdit.evaluate(cells[:60], generator.generate(30), **quick).to_frame()
        >>> frame.loc["scc", ["floor", "grade"]].index.tolist()
        ['floor', 'grade']
        """
        nothing = (None, None)
        rows = {
            name: {
                "title": score.metric.title,
                "group": score.metric.group,
                "value": score.value,
                "low": (score.interval or nothing)[0],
                "high": (score.interval or nothing)[1],
                "floor": score.floor,
                "floor_low": (score.floor_interval or nothing)[0],
                "floor_high": (score.floor_interval or nothing)[1],
                "scaled": score.scaled,
                "grade": score.grade,
                "blind": score.is_blind,
                "best": score.metric.best,
                "n": score.n,
            }
            for name, score in self.scores.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("metric")

    def _repr_html_(self) -> str:
        """Show the verdict and the scores in a notebook."""
        shown = self.to_frame()[["title", "value", "floor", "scaled", "grade", "blind", "n"]]
        table = shown.to_html(float_format=lambda value: f"{value:.3g}", na_rep="", border=0)
        verdict = self.verdict
        return f"<p><b>{escape(verdict.headline)}.</b> {escape(verdict.summary)}</p>{table}"

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``metrics.json``: plain values, no arrays."""
        described = {
            name: {"title": score.metric.title, "group": score.metric.group, "family": score.metric.family}
            | score.to_dict()
            | {"sentence": score.metric.sentence, "elsewhere": list(score.metric.elsewhere)}
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
            "families": [family._asdict() for family in self.families],
            "metrics": described,
            "per_type": types,
            "giveaways": [gene._asdict() for gene in self.giveaways],
            "omitted": self.omitted,
            "notes": self.notes,
            "versions": self.versions,
        }

    def table(self) -> str:
        """Return a plain-text table with one row per metric, the omitted metrics, n and the seeds."""
        seeds = ", ".join(map(str, self.seeds))
        lines = [
            self.verdict.headline + ": " + self.verdict.summary,
            "",
            format_table(self.scores),
            "",
            f"n = {self.n} cells of each set, {self.n_genes} genes, seeds {seeds}; floor: {self.floor}",
            "scaled: 1 is as good as other real cells, 0 as genes of a type drawn one by one; "
            "blind: with so few cells, the metric sees no set that is worse on purpose",
        ]
        missing: dict[str, list[str]] = {}
        for name, reason in self.omitted.items():
            missing.setdefault(reason, []).append(name)
        return "\n".join(lines + [f"omitted ({reason}): {', '.join(names)}" for reason, names in missing.items()])


def evaluate(
    real: ad.AnnData,
    synthetic: ad.AnnData,
    *,
    train: ad.AnnData | None = None,
    label: str | None = None,
    condition: str | None = None,
    donor: str | None = None,
    full: bool = False,
    n_cells: int = 1000,
    n_genes: int = 2000,
    seeds: Sequence[int] | None = None,
    bootstrap: int = 200,
    ignore: Sequence[str] = (),
    layer: str | None = None,
    use_raw: bool = False,
    space: Space | None = None,
    round_counts: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Compare synthetic cells with held-out real cells; every metric comes with its floor.

    The floor is the score that other real cells get: real training cells against real held-out cells, with the same
    code, number of cells and seeds. Without training cells, each seed splits the real cells into two halves (stratified
    by label, if given). One half is the reference for synthetic cells and floor; the other half gives the floor.

    Parameters
    ----------
    real
        Held-out cells, which the generator has not been trained on.
    synthetic
        Generated cells.
    train
        The cells that the generator was trained on. Without them, memorization is not scored.
    label
        Column of ``obs`` with the labels, in every set.
    condition
        Column of ``obs`` with conditions, such as a treatment, in every set. Genes that differ between them within
        each label are compared.
    donor
        Column of ``obs`` with the donors, or batches, of the real and the training cells. Floors and memorization are
        then between donors: real cells are split by donor, or with training cells, those of donors without training
        cells are the reference. Held-out cells of donors with training cells serve to attack their membership.
    full
        Compute the metrics that take long too: forests, boosted trees, a neural network, and co-expression modules.
    n_cells
        Largest number of cells to draw from each set, 20 to 5000. Equally many cells are drawn from all sets. Time and
        memory grow with the square.
    n_genes
        Number of most variable genes to use.
    seeds
        One draw (and split) of the cells per seed. By default 0; with `full`, 0, 1 and 2.
    bootstrap
        Resamples for the 95% intervals: halves without replacement, see :mod:`wbdit.evaluation.intervals`. 0 for none.
    ignore
        Labels that are not cell types, such as ``"unassigned"``. Their cells are excluded from the scores per type,
        from ``lfc_slope`` and from ``tstr``; the other metrics include them.
    layer, use_raw
        The matrix of the real and the training cells, as in :func:`wbdit.fit`.
    space, round_counts
        How to read the values of all cells, as in :func:`wbdit.fit`.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    The scores with their floors, the notes and the data for the figures.

    Raises
    ------
    InputError
        If the cells cannot be used or compared, or a parameter is out of range.

    Examples
    --------
    >>> synthetic = generator.generate(30)
    >>> quick = dict(n_cells=30, n_genes=50, seeds=(0,), bootstrap=0, progress=False)
    >>> result = wbdit.evaluate(cells[:60], synthetic, **quick)
    >>> result.n, result.scores["scc"].grade
    (30, 'apart')
    >>> result.omitted["tstr"]
    'no label column was given'
    """
    seeds = tuple(int(seed) for seed in (seeds if seeds is not None else (0, 1, 2) if full else (0,)))
    if not seeds or min(seeds) < 0 or n_genes < 2:
        raise InputError("give `seeds` of 0 or above, and `n_genes` of 2 or more")
    if not MIN_CELLS <= n_cells <= MOST_CELLS:
        raise InputError(
            f"give `n_cells` of {MIN_CELLS} to {MOST_CELLS}, not {n_cells}: all pairs of cells are compared"
        )
    if bootstrap < 0 or bootstrap == 1:
        raise InputError(f"`bootstrap` is 0 for no intervals, or 2 resamples or more, not {bootstrap}")
    sets = {"real": real, "synthetic": synthetic} | ({} if train is None else {"train": train})
    source = Source(layer, use_raw, space, round_counts)
    aligned = align(sets, label=label, n_genes=n_genes, source=source, condition=condition, donor=donor)
    everyone = aligned.sets["real"]
    aligned = _between_donors(aligned)
    n = _equal_size(aligned, n_cells, seeds)
    # without an error of the floor, nothing can be said of what a metric sees
    plan = Plan(n, n_cells, bootstrap, _ignored(aligned, label, ignore), full, bootstrap > 0 or len(seeds) > 1)
    notes = [*aligned.notes, *_cautions(aligned, plan, label)]
    with _lean_libraries(), _progress_bar(len(seeds) * STAGES_PER_SEED + STAGES_ONCE, progress) as announce:
        runs = [run_seed(aligned, plan, seed, announce, first=i == 0) for i, seed in enumerate(seeds)]
    members = _names(aligned.sets["train"].donors) if train is not None else []
    attacks = [score_donors(everyone, aligned.sets["synthetic"], members, seed) for seed in seeds]
    if attacks[0][1]:
        notes.append(_attack_note(attacks[0][1]))
    parts = {
        "overall": [run.overall for run in runs],
        "memory": [run.memory for run in runs],
        "copies": [run.copies for run in runs],
        "donors": [comparison for comparison, _ in attacks],
    }
    omitted = {} if full else dict.fromkeys((name for name, metric in METRICS.items() if metric.full), ON_REQUEST)
    omitted |= {name: reason for rows in parts.values() for row in rows for name, reason in row.omitted.items()}
    found = {
        name: score
        for rows in parts.values()
        for name, score in _scores(rows, seeds, bootstrap > 0, runs[0].worse).items()
    }
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
        giveaways=runs[0].giveaways,
        figures=runs[0].figures,
    )


def _between_donors(aligned: Aligned) -> Aligned:
    """Keep the real cells of donors without training cells as the reference, if there are such donors."""
    real, train = aligned.sets["real"], aligned.sets.get("train")
    if real.donors is None:
        return aligned
    if train is None:
        if len(names := _names(real.donors)) < 2:
            raise InputError(f"the real cells are of one donor ({names[0]}): a floor between donors needs two")
        return aligned
    seen = np.isin(real.donors, _names(train.donors))
    if int((~seen).sum()) < 2 * MIN_CELLS:
        note = "nearly all real cells are of donors with training cells: floors and memorization share donors with them"
        return replace(aligned, notes=[*aligned.notes, note])
    kept = real.take(np.flatnonzero(~seen))
    note = f"the reference are {len(kept)} real cells of {len(_names(kept.donors))} donors without training cells"
    return replace(aligned, sets=aligned.sets | {"real": kept}, notes=[*aligned.notes, note])


def _names(column: np.ndarray | None) -> list[str]:
    return [] if column is None else sorted({str(name) for name in column})


def _attack_note(by_count: dict[int, float]) -> str:
    areas = ", ".join(f"{value:.2f} by {n} cells" for n, value in by_count.items())
    return (
        f"donors with training cells are told from others with an AUC of {areas} per donor, by one attack; "
        "that it fails does not show that cells are private"
    )


def _equal_size(aligned: Aligned, n_cells: int, seeds: Sequence[int]) -> int:
    """Return the size that every set can provide; real cells are split if they must also provide the floor."""
    sizes = {name: len(cells) for name, cells in aligned.sets.items()}
    shares = dict(sizes)
    if "train" not in sizes:
        real = aligned.sets["real"]
        shares["real"] = min(len(half) for seed in seeds for half in halves_of(real, seed))
    smallest = min(shares, key=lambda name: shares[name])
    if shares[smallest] < MIN_CELLS:
        needed = MIN_CELLS if smallest != "real" or "train" in sizes else 2 * MIN_CELLS
        raise InputError(f"too few {smallest} cells: {sizes[smallest]}, at least {needed} are required")
    return min(n_cells, shares[smallest])


def _ignored(aligned: Aligned, label: str | None, ignore: Sequence[str]) -> tuple[str, ...]:
    """Return the labels to ignore; refuse labels that no cell has."""
    ignored = tuple(dict.fromkeys(map(str, ignore)))
    if ignored and label is None:
        raise InputError(f"labels to ignore ({', '.join(ignored)}) need a label column: give its name as `label`")
    known = set().union(*_label_names(aligned).values())
    if unknown := [name for name in ignored if name not in known]:
        raise InputError(
            f"cannot ignore a label: no cell is labeled {unknown[0]!r}; the labels are: {', '.join(sorted(known))}"
        )
    return ignored


def _cautions(aligned: Aligned, plan: Plan, label: str | None) -> list[str]:
    """Return cautions for the interpretation; refuse sets that share no label with the real cells."""
    notes = []
    if larger := [f"{len(cells):,} {name}" for name, cells in aligned.sets.items() if len(cells) > plan.n]:
        notes.append(f"{plan.n:,} cells of each set are drawn at random, of {' and '.join(larger)} cells")
    whole = [name for name, cells in aligned.sets.items() if len(cells) == plan.n]
    if whole:
        notes.append(
            f"each seed draws all {' and '.join(whole)} cells, so the deviation over seeds understates sampling error"
        )
    if label is None:
        return notes
    if plan.ignored:
        notes.append(f"excluded from all metrics that use labels: cells labeled {', '.join(plan.ignored)}")
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
    """Return the labels in each set; empty if no label column was given."""
    return {name: set(_names(cells.labels)) for name, cells in aligned.sets.items()}


def _scores(
    runs: Sequence[Comparison],
    seeds: tuple[int, ...],
    with_intervals: bool,
    worse: dict[str, dict[str, float]] | None = None,
) -> dict[str, Score]:
    """Return a score for each metric that all seeds computed, for the synthetic cells and for the floor."""

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
            {kind: values[name] for kind, values in (worse or {}).items() if name in values},
        )
        for name in taken
        if not any(name in run.omitted for run in runs)
    }


def _type_scores(runs: list[SeedRun], seeds: tuple[int, ...], with_intervals: bool) -> dict[str, dict[str, Score]]:
    """Return scores by type, for types that all seeds scored."""
    scored = [name for name in runs[0].per_type if all(name in run.per_type for run in runs)]
    return {name: _scores([run.per_type[name] for run in runs], seeds, with_intervals) for name in scored}


@contextmanager
def _progress_bar(total: int, show: bool) -> Iterator[Callable[[str], None]]:
    """Yield a function that announces the next stage and counts the previous one as done."""
    with progress_bar("evaluating", show) as bar:
        done = count()
        yield lambda stage: bar(next(done) / total, stage)
        bar(1.0, "done")


@contextmanager
def _lean_libraries() -> Iterator[None]:
    """Run BLAS and OpenMP on one thread, and scikit-learn without checking its input, a quarter of a forest's time.

    Threads gain little on matrices this small, and lose much if other programs share the cores.
    """
    try:
        from sklearn import config_context
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
    except ImportError:
        raise need_extra("scikit-learn") from None
    with threadpool_limits(1), config_context(assume_finite=True, skip_parameter_validation=True):
        yield
