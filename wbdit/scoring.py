"""Scoring one set of cells against real ones, the same code for synthetic cells and for the floor."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from wbdit import metrics
from wbdit.alignment import Aligned, CellSet
from wbdit.figure_data import Cells, FigureData

CFGEN_COMPONENTS = 30
SCDIFFUSION_COMPONENTS = 50
MIN_PER_TYPE = 10
STAGES_PER_SEED = 9  # four for the synthetic cells, four for the floor, the types
SPLIT = 3  # the random stream that halves the real cells; 0 to 2 draw


class TypeRun(NamedTuple):
    """The distances for one type with one seed, ``n`` cells of each set."""

    n: int
    synthetic: dict[str, float]
    floor: dict[str, float]


class SeedRun(NamedTuple):
    """Everything that one seed gives."""

    synthetic: dict[str, float]
    floor: dict[str, float]
    per_type: dict[str, TypeRun]
    omitted: dict[str, str]
    figures: FigureData


class Basis(NamedTuple):
    """CFGen's principal components: fitted on real cells, used for every set."""

    mean: np.ndarray
    axes: np.ndarray

    @classmethod
    def fit(cls, real: Cells) -> Basis:
        """Fit on real cells."""
        return cls(*metrics.pca_axes(real.values, CFGEN_COMPONENTS))

    def project(self, values: np.ndarray) -> np.ndarray:
        """Return ``(n, components)`` of ``(n, genes)``."""
        return (values - self.mean) @ self.axes


def run_seed(aligned: Aligned, n: int, n_cells: int, seed: int, announce: Callable[[str], None]) -> SeedRun:
    """Draw ``n`` cells of each set and score the synthetic ones and the floor, overall and by type.

    Parameters
    ----------
    aligned
        The sets ``"real"``, ``"synthetic"`` and maybe ``"train"``; without it, the real cells are split.
    n
        Cells to draw of each set.
    n_cells
        Most cells to draw of each type.
    announce
        Called with each stage's name before it starts.
    """
    synthetic = aligned.sets["synthetic"]
    if "train" in aligned.sets:
        real, other_real = aligned.sets["real"], aligned.sets["train"]
    else:
        real, other_real = split_halves(aligned.sets["real"], np.random.default_rng([seed, SPLIT]))
    pools = {"real": real, "synthetic": synthetic, "floor": other_real}
    drawn = {name: draw(pool, n, np.random.default_rng([seed, i])) for i, (name, pool) in enumerate(pools.items())}
    basis = Basis.fit(drawn["real"])
    types = common_types([cells.labels for cells in drawn.values()])
    scores: dict[str, dict[str, float]] = {}
    omitted: dict[str, str] = {}
    for name in ("synthetic", "floor"):
        scores[name], reasons = score_cells(
            drawn["real"],
            drawn[name],
            basis,
            types,
            has_zeros=aligned.space != "scaled",
            announce=lambda stage, name=name: announce(f"seed {seed}, {name}: {stage}"),  # type: ignore[misc]
        )
        omitted |= reasons
    announce(f"seed {seed}: types")
    per_type = score_types(pools, n_cells, basis, seed)
    return SeedRun(scores["synthetic"], scores["floor"], per_type, omitted, FigureData.of(drawn, aligned.genes))


def score_types(pools: dict[str, CellSet], n_cells: int, basis: Basis, seed: int) -> dict[str, TypeRun]:
    """Score each type with enough cells in every set, at the size of the smallest."""
    runs = {}
    for name in common_types([pool.labels for pool in pools.values()]):
        n = min(n_cells, *(int(np.sum(pool.labels == name)) for pool in pools.values()))
        synthetic = score_type(pools["real"], pools["synthetic"], name, n, basis, seed)
        floor = score_type(pools["real"], pools["floor"], name, n, basis, seed)
        runs[name] = TypeRun(n, synthetic, floor)
    return runs


def draw(pool: CellSet, n: int, rng: np.random.Generator) -> Cells:
    """Draw ``n`` cells without replacement, as dense arrays."""
    chosen = pool.take(rng.choice(len(pool), n, replace=False))
    return Cells(chosen.values.toarray(), chosen.labels)


def split_halves(cells: CellSet, rng: np.random.Generator) -> tuple[CellSet, CellSet]:
    """Split into two random halves, each label evenly where there are labels."""
    order = rng.permutation(len(cells))
    if cells.labels is not None:
        order = order[np.argsort(cells.labels[order], kind="stable")]
    # every second cell of an order that is sorted by label and random within it
    return cells.take(np.sort(order[0::2])), cells.take(np.sort(order[1::2]))


def common_types(sets: list[np.ndarray | None], at_least: int = MIN_PER_TYPE) -> list[str]:
    """Return the labels that have ``at_least`` cells in every set, sorted."""
    counted = [dict(zip(*np.unique(labels, return_counts=True), strict=True)) for labels in sets if labels is not None]
    if len(counted) < len(sets) or not counted:
        return []
    return sorted(str(name) for name in counted[0] if all(counts.get(name, 0) >= at_least for counts in counted))


def score_cells(
    real: Cells,
    other: Cells,
    basis: Basis,
    types: list[str],
    *,
    has_zeros: bool,
    announce: Callable[[str], None] = lambda stage: None,
) -> tuple[dict[str, float], dict[str, str]]:
    """Score ``other`` against ``real``, as many cells of each.

    Parameters
    ----------
    real, other
        The reference, and synthetic cells or (for the floor) other real ones.
    basis
        CFGen's components, fitted on ``real``.
    types
        Labels to compare fold changes of.
    has_zeros
        Whether zeros mean "not detected" (not so in scaled values).
    announce
        Called with each stage's name before it starts.

    Returns
    -------
    The values by metric, and a reason for each metric that could not be taken.
    """
    announce("distances")
    scores = distances(basis.project(real.values), basis.project(other.values))
    joint = metrics.joint_pca(real.values, other.values, SCDIFFUSION_COMPONENTS)
    scores["mmd_scdiffusion"] = metrics.mmd_scdiffusion(*joint)
    announce("forest on components")
    scores["rf_auc"] = metrics.forest_auc(*joint)
    announce("forest on genes")
    scores["rf_auc_genes"] = metrics.forest_auc(real.values, other.values)
    announce("genes and labels")
    scores["scc"] = metrics.scc(real.values, other.values)
    scores["var_r2"] = metrics.var_r2(real.values, other.values)
    reasons = {}
    if has_zeros:
        scores["zero_mae"] = metrics.zero_mae(real.values, other.values)
    else:
        reasons["zero_mae"] = "scaled values have no zeros to count"
    by_label, missing = score_labels(real, other, types)
    scores |= by_label
    reasons |= missing | {
        name: "undefined for these cells" for name, value in scores.items() if not math.isfinite(value)
    }
    return {name: value for name, value in scores.items() if name not in reasons}, reasons


def score_labels(real: Cells, other: Cells, types: list[str]) -> tuple[dict[str, float], dict[str, str]]:
    """Return the metrics that need labels, and reasons for those that could not be taken."""
    if real.labels is None or other.labels is None:
        return {}, dict.fromkeys(("lfc_slope", "tstr"), "no label column was given")
    scores, reasons = {}, {}
    if len(types) >= 2:
        scores["lfc_slope"] = metrics.lfc_slope(real.values, real.labels, other.values, other.labels, types)
    else:
        reasons["lfc_slope"] = f"fewer than two types have {MIN_PER_TYPE} cells in every set"
    if len(np.unique(other.labels)) < 2:
        reasons["tstr"] = "a classifier needs two labels, and one of the sets has a single one"
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lbfgs may stop at its last iteration; the accuracy is what counts
            scores["tstr"] = metrics.tstr(other.values, other.labels, real.values, real.labels)
    return scores, reasons


def score_type(real: CellSet, other: CellSet, name: str, n: int, basis: Basis, seed: int) -> dict[str, float]:
    """Return the distances between the cells of one type, ``n`` of each set.

    The same ``seed`` draws the same real cells, so that synthetic cells and the floor face the same ones.
    """
    drawn = []
    for pool, stream in ((real, 0), (other, 1)):
        rows = np.flatnonzero(pool.labels == name)
        chosen = np.random.default_rng([seed, stream]).choice(rows, n, replace=False)
        drawn.append(basis.project(pool.take(chosen).values.toarray()))
    return distances(*drawn)


def distances(real: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Return the CFGen family for two sets of projected cells."""
    return {
        "w1": metrics.wasserstein(real, other, 1),
        "w2": metrics.wasserstein(real, other, 2),
        "mmd_cfgen": metrics.mmd_cfgen(real, other),
    }
