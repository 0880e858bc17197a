"""Scores of synthetic cells against real cells; the same code gives the floor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from wbdit.evaluation import distances, donors, estimators, memorization
from wbdit.evaluation.align import Aligned, CellSet
from wbdit.evaluation.classifiers import CLASSIFIERS, Giveaway, giveaways
from wbdit.evaluation.differential import Agreement, Contrasts, against_rest, between_conditions
from wbdit.evaluation.estimators import Basis, Estimates, RealTests
from wbdit.evaluation.figure_data import AlignedCells, FigureData
from wbdit.evaluation.genes import most_variable
from wbdit.evaluation.intervals import AT_MOST, Estimate, Halves, proportion
from wbdit.evaluation.worse import WORSE

ZEROS, TOTALS = ("zero_mae", "dropout_mean"), ("library_w1", "detected_w1")
CONDITION_CALLS = tuple(f"{name}_condition" for name in Agreement._fields)
BY_TYPE = ("lfc_slope", *Agreement._fields, "within_corr", "within_var", "null_ks", "null_calls")
DONORS = ("donor_mia_auc", "donor_tpr_at_1", "donor_tpr_at_5")
MIN_CELLS = 20  # the forest needs cells to hold out
MOST_CELLS = 5000  # distances between 2 x 5,000 cells take 0.8 GB
MIN_PER_TYPE = 10
STAGES_PER_SEED = 8  # three for the synthetic cells, three for the floor, one for memorization, one for the types
STAGES_ONCE = len(WORSE)  # of the first seed
MOST_COPIES = 5000  # held-out and synthetic cells that are searched for copies
BASIS_CELLS = 1000  # cells that components are fitted on
NO_TRAINING = "no training cells were given"
SPLIT, HALVES, MEMORY, NULL, WORSENED, MEMBERS, COPIES = 3, 4, 5, 6, 7, 8, 9  # random streams; 0 to 2 draw the cells


class Plan(NamedTuple):
    """Sample sizes of a comparison.

    Attributes
    ----------
    n
        Cells per set.
    n_cells
        Most cells per type.
    resamples
        Resamples for the intervals.
    ignored
        Labels that are not cell types; excluded from all metrics that use labels.
    full
        Whether to compute the metrics that take long.
    worse
        Whether to score the sets that are worse on purpose, with the first seed.
    """

    n: int
    n_cells: int
    resamples: int
    ignored: tuple[str, ...] = ()
    full: bool = False
    worse: bool = True


class Comparison(NamedTuple):
    """Estimates by metric, of synthetic cells and of the floor, at ``n`` cells per set.

    ``omitted`` gives a reason for each missing metric.
    """

    n: int
    synthetic: Estimates
    floor: Estimates
    omitted: dict[str, str]


class SeedRun(NamedTuple):
    """Results of one seed; ``worse`` has the values of sets that are worse on purpose, by set and metric."""

    overall: Comparison
    memory: Comparison
    copies: Comparison
    per_type: dict[str, Comparison]
    figures: FigureData
    worse: dict[str, dict[str, float]]
    giveaways: list[Giveaway]


def run_seed(aligned: Aligned, plan: Plan, seed: int, announce: Callable[[str], None], *, first: bool) -> SeedRun:
    """Draw equally many cells from each set; score the synthetic cells and the floor, overall and per type.

    Parameters
    ----------
    aligned
        The sets ``"real"``, ``"synthetic"`` and optionally ``"train"``. Without ``"train"``, the real cells are split.
    plan, seed
        Sample sizes, and the seed of all random draws.
    announce
        Called with the name of each stage before it starts.
    first
        Whether to score the sets that are worse on purpose, if planned, and to name the genes that give cells away.
    """
    synthetic = aligned.sets["synthetic"]
    if "train" in aligned.sets:
        real, other_real = aligned.sets["real"], aligned.sets["train"]
    else:
        real, other_real = halves_of(aligned.sets["real"], seed)
    pools = {"real": real, "synthetic": synthetic, "floor": other_real}
    drawn = {name: draw(pool, plan.n, np.random.default_rng([seed, i])) for i, (name, pool) in enumerate(pools.items())}
    basis = Basis.fit(drawn["real"])
    halves = Halves.draw(plan.n, plan.resamples, np.random.default_rng([seed, HALVES]))
    types = common_types([cells.labels for cells in drawn.values()], plan.ignored)
    compared = Compared(drawn["real"], basis, types, plan, seed, has_zeros=aligned.space != "scaled")
    scores: dict[str, Estimates] = {}
    omitted: dict[str, str] = {}
    for name in ("synthetic", "floor"):
        stages = partial(_stage, announce, f"seed {seed}, {name}")
        scores[name], reasons = score_cells(compared, drawn[name], halves, stages)
        omitted |= reasons
    announce(f"seed {seed}: memorization")
    memory, copied = score_memory(aligned, plan, seed), score_copies(aligned, seed)
    announce(f"seed {seed}: types")
    per_type = score_types(pools, plan, basis, seed, has_zeros=compared.has_zeros)
    overall = Comparison(plan.n, scores["synthetic"], scores["floor"], omitted)
    worse = score_worse(compared, drawn["floor"], announce) if first and plan.worse else {}
    telling = giveaways(drawn["real"].values, drawn["synthetic"].values, aligned.genes) if first else []
    return SeedRun(overall, memory, copied, per_type, FigureData.of(drawn, aligned.genes), worse, telling)


def _stage(announce: Callable[[str], None], which: str, stage: str) -> None:
    announce(f"{which}: {stage}")


def draw(pool: CellSet, n: int, rng: np.random.Generator) -> AlignedCells:
    """Draw ``n`` cells without replacement and return dense arrays."""
    chosen = pool.take(rng.choice(len(pool), n, replace=False))
    return AlignedCells(chosen.values.toarray(), chosen.labels, chosen.totals, chosen.conditions)


def halves_of(cells: CellSet, seed: int) -> tuple[CellSet, CellSet]:
    """Split the real cells of a seed; see :func:`split_halves`."""
    return split_halves(cells, np.random.default_rng([seed, SPLIT]))


def split_halves(cells: CellSet, rng: np.random.Generator) -> tuple[CellSet, CellSet]:
    """Split cells into two random halves: by donor if there are several, else stratified by label if there are any."""
    if cells.donors is not None and len(np.unique(cells.donors)) > 1:
        return split_donors(cells, cells.donors, rng)
    order = rng.permutation(len(cells))
    if cells.labels is not None:
        order = order[np.argsort(cells.labels[order], kind="stable")]
    # the order is sorted by label and random within a label, so every second cell stratifies the halves
    return cells.take(np.sort(order[0::2])), cells.take(np.sort(order[1::2]))


def split_donors(cells: CellSet, of: np.ndarray, rng: np.random.Generator) -> tuple[CellSet, CellSet]:
    """Split donors into two random groups with about as many cells; the donor of each cell is in ``of``."""
    names, sizes = np.unique(of, return_counts=True)
    total = 0
    first: set[str] = set()
    for i in rng.permutation(len(names)):
        if not first or (total + sizes[i] / 2 <= len(of) / 2 and len(first) < len(names) - 1):
            first.add(names[i])
            total += sizes[i]
    inside = np.isin(of, list(first))
    return cells.take(np.flatnonzero(inside)), cells.take(np.flatnonzero(~inside))


def common_types(
    sets: list[np.ndarray | None], ignored: tuple[str, ...] = (), at_least: int = MIN_PER_TYPE
) -> list[str]:
    """Return the sorted labels that have ``at_least`` cells in every set and are not ignored."""
    counted = [dict(zip(*np.unique(labels, return_counts=True), strict=True)) for labels in sets if labels is not None]
    if len(counted) < len(sets) or not counted:
        return []
    common = (str(name) for name in counted[0] if all(counts.get(name, 0) >= at_least for counts in counted))
    return sorted(name for name in common if name not in ignored)


@dataclass(frozen=True)
class Compared:
    """What all sets of a seed are compared with.

    Attributes
    ----------
    real
        The reference cells.
    basis
        CFGen's components, fitted on ``real``.
    types
        Labels with enough cells in every set.
    plan, seed
        Sample sizes, and the seed of the random draws.
    has_zeros
        Whether zeros mean "not detected"; False for scaled values.
    """

    real: AlignedCells
    basis: Basis
    types: list[str]
    plan: Plan
    seed: int
    has_zeros: bool
    _tests: dict[tuple[str, ...], RealTests] = field(default_factory=dict, repr=False)

    @cached_property
    def components(self) -> np.ndarray:
        """The real cells in CFGen's components, ``(n, k)``."""
        return self.basis.project(self.real.values)

    def tests_of(
        self, key: tuple[str, ...], real: AlignedCells, test: Callable[[AlignedCells], Contrasts], halves: Halves
    ) -> RealTests:
        """Test the real cells and their halves, once for all sets that are compared with them."""
        key = (*key, str(len(halves.real)))
        if key not in self._tests:
            self._tests[key] = RealTests.of(real, test, halves)
        return self._tests[key]

    @cached_property
    def chosen(self) -> tuple[str, ...]:
        """The classifiers to train."""
        return CLASSIFIERS if self.plan.full else CLASSIFIERS[:1]


def score_cells(
    compared: Compared, other: AlignedCells, halves: Halves, announce: Callable[[str], None]
) -> tuple[Estimates, dict[str, str]]:
    """Score ``other`` against the real cells, with equally many cells in both.

    Parameters
    ----------
    compared
        The reference, and how to compare.
    other
        Synthetic cells or, for the floor, other real cells.
    halves
        Resamples of both sets, for the intervals.
    announce
        Called with the name of each stage before it starts.

    Returns
    -------
    The estimates by metric, and a reason for each metric that could not be computed.
    """
    values, full = (compared.real.values, other.values), compared.plan.full
    announce("distances")
    components = compared.components, compared.basis.project(other.values)
    scores = estimators.cfgen_distances(*components, halves)
    joint = distances.joint_pca(*values, estimators.SCDIFFUSION_COMPONENTS)
    scores |= estimators.joint_distances(joint, halves) | estimators.neighborhoods(*joint, halves)
    scores["mmd_raw"] = estimators.raw_mmd(*values, halves)
    announce("classifiers")
    if full:
        scores |= {"rf_auc": estimators.forest(*joint), "rf_auc_genes": estimators.forest(*values)}
    scores |= estimators.two_sample_tests(*values, compared.chosen)
    announce("genes and labels")
    scores |= estimators.gene_means(*values, halves)
    scores |= estimators.gene_structure(*values, halves, modules=full)
    scores |= estimators.gene_curves(*values, halves, has_zeros=compared.has_zeros)
    reasons: dict[str, str] = {}
    if compared.has_zeros:
        scores["zero_mae"] = estimators.zero_fractions(*values, halves)
    else:
        reasons |= dict.fromkeys(ZEROS, "zeros of scaled values do not mean that a gene was not detected")
    if compared.real.totals is not None and other.totals is not None:
        scores |= estimators.library_sizes(compared.real.totals, other.totals, halves)
    else:
        reasons |= dict.fromkeys(TOTALS, "not every set holds counts")
    by_label, missing = score_labels(compared, other, halves)
    return _defined(scores | by_label, reasons | missing)


def score_labels(compared: Compared, other: AlignedCells, halves: Halves) -> tuple[Estimates, dict[str, str]]:
    """Compute the metrics that need labels, with a reason for each that could not be computed."""
    real = compared.real
    if real.labels is None or other.labels is None:
        return {}, dict.fromkeys((*BY_TYPE, "tstr", *CONDITION_CALLS), "no label column was given")
    kept = [~np.isin(labels, compared.plan.ignored) for labels in (real.labels, other.labels)]
    real, other = real.take(np.flatnonzero(kept[0])), other.take(np.flatnonzero(kept[1]))
    assert other.labels is not None
    types = [
        name for name in compared.types if np.sum(other.labels == name) >= MIN_PER_TYPE
    ]  # a worse set may lack one
    halves = Halves(halves.real[:, kept[0]], halves.other[:, kept[1]], halves.n)
    scores: Estimates = {}
    reasons: dict[str, str] = {}
    if len(types) >= 2:
        scores["lfc_slope"] = estimators.fold_changes(real, other, types, halves)
        test = partial(_test_types, types)
        wanted = compared.tests_of(("types", *types), real, test, halves)
        scores |= estimators.differential_expression(other, test, wanted, halves)
        scores |= estimators.within_types(real, other, types, halves)
        rng = np.random.default_rng([compared.seed, NULL])
        scores |= estimators.null_calibration(other, types, rng)
    else:
        reasons |= dict.fromkeys(BY_TYPE, f"fewer than two types have {MIN_PER_TYPE} cells in every set")
    if real.conditions is None or other.conditions is None:
        reasons |= dict.fromkeys(CONDITION_CALLS, "no condition column was given")
    elif not types:
        reasons |= dict.fromkeys(CONDITION_CALLS, f"no type has {MIN_PER_TYPE} cells in every set")
    else:
        between = partial(_test_conditions, types, sorted({str(name) for name in real.conditions}))
        wanted = compared.tests_of(("conditions", *types), real, between, halves)
        found = estimators.differential_expression(other, between, wanted, halves)
        scores |= {f"{name}_condition": estimate for name, estimate in found.items()}
    if len(real.values) == 0 or len(np.unique(other.labels)) < 2:
        reasons["tstr"] = "a classifier needs cells of at least two labels to train on, and real cells to test on"
    else:
        scores["tstr"] = estimators.classifier(other, real)
    return scores, reasons


def score_worse(
    compared: Compared, cells: AlignedCells, announce: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Score real cells that are made worse, by set and metric; see :mod:`wbdit.evaluation.worse`."""
    found = {}
    unresampled = Halves.draw(len(cells.values), 0, np.random.default_rng(0))
    for i, (name, (make, words)) in enumerate(WORSE.items()):
        announce(f"seed {compared.seed}: what if there were {words}")
        made = make(cells, np.random.default_rng([compared.seed, WORSENED, i]))
        if made is not None:
            scores, _ = score_cells(compared, made, unresampled, lambda stage: None)
            found[name] = {metric: estimate.value for metric, estimate in scores.items()}
    return found


def _test_types(types: list[str], cells: AlignedCells) -> Contrasts:
    assert cells.labels is not None
    return against_rest(cells.values, cells.labels, types)


def _test_conditions(types: list[str], conditions: list[str], cells: AlignedCells) -> Contrasts:
    assert cells.labels is not None
    assert cells.conditions is not None
    return between_conditions(cells.values, cells.labels, cells.conditions, types, conditions)


def score_memory(aligned: Aligned, plan: Plan, seed: int) -> Comparison:
    """Score nearness to the training cells, with the held-out cells split into two halves.

    The first half is compared with the training cells. The principal components are fitted on the second half, so that
    neither training nor synthetic cells influence them. The second half also replaces the synthetic cells in the floor.
    All sets are samples, so a copy is missed if its original is not drawn; see :func:`score_copies`.
    """
    names = ("mia_auc", "dcr_ratio")
    if "train" not in aligned.sets:
        return Comparison(0, {}, {}, dict.fromkeys(names, NO_TRAINING))
    train, synthetic = aligned.sets["train"], aligned.sets["synthetic"]
    heldout, stand_in = halves_of(aligned.sets["real"], seed)
    pools = (train, heldout, synthetic, stand_in)
    m = min(plan.n, *(len(pool) for pool in pools))
    if m < MIN_CELLS:
        return Comparison(m, {}, {}, dict.fromkeys(names, f"needs {2 * MIN_CELLS} real cells, which are split in half"))
    rng = np.random.default_rng([seed, MEMORY])
    dense = [pool.values[rng.choice(len(pool), m, replace=False)].toarray() for pool in pools]
    basis = Basis.fit(AlignedCells(dense[3], None))
    if basis.axes.shape[1] == 0:
        return Comparison(m, {}, {}, dict.fromkeys(names, "undefined for these cells"))
    ours, held, ones, twos = (basis.project(cells) for cells in dense)
    (scores, reasons), (floor, floor_reasons) = (
        _defined(estimators.nearness(ours, held, cells, plan.resamples, np.random.default_rng([seed, HALVES])), {})
        for cells in (ones, twos)
    )
    return Comparison(m, scores, floor, reasons | floor_reasons)


def score_copies(aligned: Aligned, seed: int) -> Comparison:
    """Score the share of copies of training cells: among the synthetic cells, and among all held-out cells.

    Distances are taken to every training cell, twice: in the components of each half of the held-out cells. A held-out
    cell counts in the components that it did not influence, a synthetic one by half in each.

    The distance of a copy is a quantile of distances between training cells. Its error counts like that of as many more
    cells; twice, since two cells are often the nearest of each other.
    """
    if "train" not in aligned.sets:
        return Comparison(0, {}, {}, {"copies": NO_TRAINING})
    rng = np.random.default_rng([seed, COPIES])
    real, synthetic = (_at_most(aligned.sets[name], MOST_COPIES, rng) for name in ("real", "synthetic"))
    halves = halves_of(real, seed)
    if min(len(half) for half in halves) < MIN_CELLS:
        return Comparison(0, {}, {}, {"copies": f"needs {2 * MIN_CELLS} real cells, which are split in half"})
    train, made = aligned.sets["train"].values, np.zeros(len(synthetic))
    sample = rng.permutation(train.shape[0])[:MOST_COPIES]
    held_out = []
    for one, other in (halves, halves[::-1]):
        basis = Basis.fit(draw(other, min(len(other), BASIS_CELLS), rng))
        if basis.axes.shape[1] == 0:
            return Comparison(len(real), {}, {}, {"copies": "undefined for these cells"})
        originals, mine, theirs = (basis.project_sparse(cells) for cells in (train, synthetic.values, one.values))
        limit = memorization.copy_distance(originals, sample)
        made += memorization.copied(mine, originals, limit) / 2
        held_out.append(memorization.copied(theirs, originals, limit))
    shares = [proportion(hits, 1 / (1 / len(hits) + 2 / len(sample))) for hits in (made, np.concatenate(held_out))]
    return Comparison(len(real), {"copies": shares[0]}, {"copies": shares[1]}, {})


def _at_most(cells: CellSet, n: int, rng: np.random.Generator) -> CellSet:
    return cells if len(cells) <= n else cells.take(np.sort(rng.choice(len(cells), n, replace=False)))


def score_donors(
    real: CellSet, synthetic: CellSet, members: Sequence[str], seed: int
) -> tuple[Comparison, dict[int, float]]:
    """Score how well donors with training cells are told from others, by held-out cells of both.

    Returns
    -------
    The metrics, at the largest number of cells per donor that all have; and the AUC by number of cells per donor.
    """
    if real.donors is None:
        return Comparison(0, {}, {}, dict.fromkeys(DONORS, "no donor column was given")), {}
    names, sizes = np.unique(real.donors, return_counts=True)
    known = {str(name): int(n) for name, n in zip(names, sizes, strict=True) if n >= donors.MIN_DONOR_CELLS}
    inside, outside = [n for n in known if n in members], [n for n in known if n not in members]
    if min(len(inside), len(outside)) < donors.MIN_DONORS:
        reason = (
            f"needs {donors.MIN_DONORS} donors with training cells and {donors.MIN_DONORS} without, each with "
            f"{donors.MIN_DONOR_CELLS} held-out cells; there are {len(inside)} and {len(outside)}"
        )
        return Comparison(0, {}, {}, dict.fromkeys(DONORS, reason)), {}
    rng = np.random.default_rng([seed, MEMBERS])
    genes_kept = most_variable(real.values.toarray(), donors.GENES)
    rows = rng.permutation(len(synthetic))[: donors.MOST_CELLS]
    made, cells = synthetic.values[rows][:, genes_kept].toarray(), real.values[:, genes_kept].toarray()
    counts = sorted({min(n, *known.values()) for n in donors.CELLS_PER_DONOR})
    found: list[Estimates] = []
    by_count: dict[int, float] = {}
    for stand_in in (made, None):
        for n in counts:
            attack = donors.donor_attack(
                stand_in, cells, real.donors, inside, outside, cells_per_donor=n, draws=donors.DRAWS, rng=rng
            )
            if stand_in is not None:
                by_count[n] = attack.auc.value
        rates = {f"donor_tpr_at_{rate}": Estimate(attack.true_positive_rate(rate / 100)) for rate in (1, 5)}
        found.append({"donor_mia_auc": attack.auc, **rates})
    return Comparison(len(inside), found[0], found[1], {}), by_count


def score_types(
    pools: dict[str, CellSet], plan: Plan, basis: Basis, seed: int, *, has_zeros: bool
) -> dict[str, Comparison]:
    """Score each type that has enough cells in every set, at the size of the smallest set."""
    runs = {}
    for name in common_types([pool.labels for pool in pools.values()], plan.ignored):
        n = min(plan.n_cells, *(int(np.sum(pool.labels == name)) for pool in pools.values()))
        halves = Halves.draw(n, min(plan.resamples, AT_MOST), np.random.default_rng([seed, HALVES]))
        # one draw of real cells serves as the reference for both the synthetic cells and the floor
        real, synthetic, floor = (
            draw(pool.take(np.flatnonzero(pool.labels == name)), n, np.random.default_rng([seed, min(i, 1)]))
            for i, pool in enumerate(pools.values())
        )
        (ours, reasons), (theirs, floor_reasons) = (
            score_type(real, other, basis, halves, has_zeros=has_zeros) for other in (synthetic, floor)
        )
        runs[name] = Comparison(n, ours, theirs, reasons | floor_reasons)
    return runs


def score_type(
    real: AlignedCells, other: AlignedCells, basis: Basis, halves: Halves, *, has_zeros: bool
) -> tuple[Estimates, dict[str, str]]:
    """Compute the metrics that are reliable for the few cells of one type."""
    scores = estimators.cfgen_distances(basis.project(real.values), basis.project(other.values), halves)
    scores["scc"] = estimators.gene_means(real.values, other.values, halves)["scc"]
    if has_zeros:
        scores["zero_mae"] = estimators.zero_fractions(real.values, other.values, halves)
    if real.totals is not None and other.totals is not None:
        scores["library_w1"] = estimators.library_sizes(real.totals, other.totals, halves)["library_w1"]
    return _defined(scores, {})


def _defined(scores: Estimates, reasons: dict[str, str]) -> tuple[Estimates, dict[str, str]]:
    """Drop the scores that are not finite, and give a reason for each."""
    reasons = reasons | {
        name: "undefined for these cells" for name, estimate in scores.items() if not math.isfinite(estimate.value)
    }
    return {name: estimate for name, estimate in scores.items() if name not in reasons}, reasons
