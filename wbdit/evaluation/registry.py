"""The metrics: meaning, best value, and how to grade a value against the real-against-real floor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Group = Literal["distribution", "genes", "counts", "labels", "memorization"]
GROUPS: dict[Group, str] = {
    "distribution": "Distribution of cells",
    "genes": "Gene statistics and co-expression",
    "counts": "Zeros and counts",
    "labels": "Cell types and labels",
    "memorization": "Memorization of training cells",
}


@dataclass(frozen=True)
class Metric:
    """A metric and its interpretation.

    Attributes
    ----------
    name, title, group, family
        Key, short title, group of the report, and the paper whose settings are used.
    best, direction
        Best value, and the side on which values are better: ``"lower"``, ``"higher"`` or ``"nearest"`` to ``best``.
    compare, near, far
        Limits of the grades ``"at the floor"`` and ``"close"``, as a ``"ratio"`` to the floor or a ``"difference"``
        from it. They are reading aids, not statistical tests.
    sentence, trust, caution
        One-sentence definition, and the finding for a value at the floor or away from it.
    chance
        Sampling error: at n cells, ``near`` of a difference is at least ``chance / sqrt(n)``, about two standard
        errors.
    low, high
        Range of the metric.
    """

    name: str
    title: str
    group: Group
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
    low: float = 0.0
    high: float = math.inf


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "w1", "Wasserstein-1", "distribution", "CFGen", 0.0, "lower", "ratio", 1.05, 1.15,
            "Mean distance that cells must move to turn one set into the other (30 principal components).",
            "cells occupy the same regions as real cells", "cells occupy other regions than real cells",
        ),
        Metric(
            "w2", "Wasserstein-2", "distribution", "CFGen", 0.0, "lower", "ratio", 1.05, 1.15,
            "The same with squared distances, which give outlying cells more weight.",
            "cells lie no farther out than real cells", "some cells lie far from the real cells",
        ),
        Metric(
            "mmd_cfgen", "MMD, fixed widths", "distribution", "CFGen", 0.0, "lower", "ratio", 1.3, 2.5,
            "Difference in density between the two sets, on five fixed length scales (30 principal components).",
            "the density of cells matches real cells",
            "the density of cells is too high in some regions and too low in others",
        ),
        Metric(
            "mmd_scdiffusion", "MMD, data widths", "distribution", "scDiffusion", 0.0, "lower", "ratio", 1.5, 3.0,
            "The same on length scales from the data (50 joint components): sensitive to a common shift.",
            "the cells as a whole are not shifted", "the cells as a whole are shifted or distorted",
        ),
        Metric(
            "mmd_raw", "MMD on genes", "distribution", "WBDiT, our definition", 0.0, "lower", "ratio", 1.3, 2.5,
            "The same on the genes themselves, without components.",
            "the density matches in gene space too", "the density differs in gene space",
        ),
        Metric(
            "ilisi", "Mixing of neighbors", "distribution", "scDiffusion", 1.0, "higher", "difference", 0.04, 0.15,
            "How evenly the ten nearest neighbors of a cell come from both sets (iLISI, 20 joint components).",
            "neighborhoods mix real and synthetic cells evenly", "real and synthetic cells form separate neighborhoods",
            1.2, high=1.0,
        ),
        Metric(
            "rf_auc", "Forest on components", "distribution", "scDiffusion", 0.5, "lower", "difference", 0.06, 0.2,
            "AUC of a random forest that separates synthetic from real cells (50 joint components): 0.5 is chance.",
            "a random forest cannot tell them from real cells by principal components",
            "a random forest tells them from real cells by principal components",
            1.6, high=1.0,
        ),
        Metric(
            "rf_auc_genes", "Forest on genes", "distribution", "scDiffusion", 0.5, "lower", "difference", 0.06, 0.2,
            "The same on the genes themselves. It is the hardest test here, because it sees zeros and whole numbers.",
            "a random forest cannot tell them from real cells by single genes",
            "a random forest tells them from real cells by single genes",
            1.6, high=1.0,
        ),
        Metric(
            "scc", "Gene means, rank", "genes", "scDiffusion", 1.0, "higher", "difference", 0.01, 0.05,
            "Spearman correlation of mean expression per gene: do genes have the real order?",
            "genes have their real mean expression", "some genes are expressed too much or too little",
            0.12, low=-1.0, high=1.0,
        ),
        Metric(
            "pcc", "Gene means, values", "genes", "scDiffusion", 1.0, "higher", "difference", 0.01, 0.05,
            "Pearson correlation of mean expression per gene: do genes have the real levels?",
            "highly expressed genes have their real level", "highly expressed genes deviate from their real level",
            low=-1.0, high=1.0,
        ),
        Metric(
            "var_r2", "Gene variances", "genes", "", 1.0, "higher", "difference", 0.025, 0.12,
            "Coefficient of determination of gene variances: 1 means that all are reproduced.",
            "genes vary as much as in real cells", "genes vary too little or too much",
            low=-math.inf, high=1.0,
        ),
        Metric(
            "wasserstein_genes", "Wasserstein, by gene", "genes", "WBDiT, our definition", 0.0, "lower", "ratio",
            1.25, 2.5,
            "Wasserstein-1 distance between the values of a gene in the two sets, averaged over genes.",
            "the distributions of single genes match", "the distributions of single genes differ",
        ),
        Metric(
            "kl_hist", "Histograms, by gene", "genes", "WBDiT, our definition", 0.0, "lower", "ratio", 1.25, 2.5,
            "Kullback-Leibler divergence between the histograms of a gene (50 bins), averaged over genes.",
            "genes take all values that they take in real cells", "genes miss values that they take in real cells",
        ),
        Metric(
            "corr_fro", "Gene-gene correlations", "genes", "", 0.0, "lower", "ratio", 1.1, 1.5,
            "Frobenius distance between the correlation matrices of the 500 most variable genes.",
            "genes are correlated as in real cells", "genes are not correlated as in real cells",
        ),
        Metric(
            "module_ari", "Co-expression modules", "genes", "", 1.0, "higher", "difference", 0.08, 0.25,
            "Agreement of the co-expression modules (ten by Ward's method, adjusted Rand index).",
            "co-expression modules match", "co-expression modules differ",
            2.0, low=-0.5, high=1.0,
        ),
        Metric(
            "zero_mae", "Zero fractions", "counts", "", 0.0, "lower", "ratio", 1.25, 2.5,
            "Absolute difference in the fraction of zeros of a gene, averaged over genes.",
            "genes are undetected as often as in real cells", "genes are undetected too often or too rarely",
            high=1.0,
        ),
        Metric(
            "library_w1", "Library sizes", "counts", "", 0.0, "lower", "ratio", 1.5, 3.0,
            "Wasserstein-1 distance between the total counts per cell (in counts).",
            "library sizes match", "library sizes are too large, too small or too uniform",
        ),
        Metric(
            "detected_w1", "Detected genes", "counts", "", 0.0, "lower", "ratio", 1.5, 3.0,
            "The same for the number of detected genes per cell.",
            "cells have as many detected genes as real cells", "cells have too many or too few detected genes",
        ),
        Metric(
            "lfc_slope", "Fold changes", "labels", "", 1.0, "nearest", "difference", 0.06, 0.15,
            "Slope of synthetic on real log fold changes between types: under 1, types differ too little.",
            "types differ as strongly as in real cells", "types differ too strongly or too weakly",
            1.2, low=-math.inf,
        ),
        Metric(
            "tstr", "Train synthetic, test real", "labels", "", 1.0, "higher", "difference", 0.04, 0.12,
            "Accuracy on real cells of a classifier trained on synthetic cells; for the floor, on other real cells.",
            "a classifier trained on them labels real cells as well as one trained on real cells",
            "a classifier trained on them labels real cells worse than one trained on real cells",
            1.0, high=1.0,
        ),
        Metric(
            "mia_auc", "Membership inference", "memorization", "", 0.5, "lower", "difference", 0.03, 0.1,
            "AUC that separates training from held-out cells by distance to synthetic cells: 0.5 is chance.",
            "training cells are no closer to them than held-out cells",
            "training cells are closer to them than held-out cells", 1.2, high=1.0,
        ),
        Metric(
            "dcr_ratio", "Distance to training cells", "memorization", "", 1.0, "higher", "difference", 0.02, 0.1,
            "Median distance of synthetic cells to the nearest training cell, over that to the nearest held-out cell.",
            "they are as far from training cells as from held-out cells",
            "they are closer to training cells than to held-out cells", 0.8,
        ),
        Metric(
            "copies", "Copies of training cells", "memorization", "", 0.0, "lower", "difference", 0.01, 0.05,
            "Share of synthetic cells closer to a training cell than 99% of training cells are to each other.",
            "they copy training cells no more often than by chance", "some of them copy a training cell", 0.3, high=1.0,
        ),
    )
}  # fmt: skip
