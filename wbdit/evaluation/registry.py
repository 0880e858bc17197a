"""What each metric means, what is best, and what its distance from the real-against-real floor says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Group = Literal["distribution", "genes", "counts", "labels", "memorization"]
GROUPS: dict[Group, str] = {
    "distribution": "Where cells lie, and how densely",
    "genes": "What genes do, one by one and together",
    "counts": "Zeros and counts",
    "labels": "Types and labels",
    "memorization": "Nearness to the training cells",
}


@dataclass(frozen=True)
class Metric:
    """A metric and how to read it.

    ``near`` and ``far`` are reading aids, not tests: how much worse than the floor a value may be and still
    count as ``"at the floor"`` or ``"close"``. They are ratios to the floor where ``compare`` is ``"ratio"``,
    differences otherwise. Few cells make some metrics jump by chance: ``near`` is then ``chance / sqrt(n)``,
    about two standard errors, where that is more. ``low`` and ``high`` bound what the metric can be.
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
            "How far, on average, cells must be moved to turn one set into the other (30 principal components).",
            "cells lie where real cells lie", "cells lie away from where real cells lie",
        ),
        Metric(
            "w2", "Wasserstein-2", "distribution", "CFGen", 0.0, "lower", "ratio", 1.05, 1.15,
            "The same with squared distances, so that outlying cells weigh more.",
            "no cells stray further than real ones do", "some cells stray far from the real ones",
        ),
        Metric(
            "mmd_cfgen", "MMD, fixed widths", "distribution", "CFGen", 0.0, "lower", "ratio", 1.3, 2.5,
            "How differently dense the two sets are, on five fixed length scales (30 principal components).",
            "cells are as dense as real ones everywhere", "cells crowd and thin out in other places than real ones",
        ),
        Metric(
            "mmd_scdiffusion", "MMD, data widths", "distribution", "scDiffusion", 0.0, "lower", "ratio", 1.5, 3.0,
            "The same on length scales taken from the cells (50 joint components): sensitive to a common shift.",
            "the cloud as a whole is in place", "the cloud as a whole is shifted or misshapen",
        ),
        Metric(
            "mmd_raw", "MMD on genes", "distribution", "WBDiT, our definition", 0.0, "lower", "ratio", 1.3, 2.5,
            "The same on the genes themselves, without components.",
            "densities hold in gene space too", "cells are differently dense in gene space",
        ),
        Metric(
            "ilisi", "Mixing of neighbors", "distribution", "scDiffusion", 1.0, "higher", "difference", 0.04, 0.15,
            "How evenly the ten nearest neighbors of a cell come from both sets (iLISI, 20 joint components).",
            "each cell has real and synthetic neighbors alike", "real and synthetic cells keep to themselves",
            1.2, high=1.0,
        ),
        Metric(
            "rf_auc", "Forest on components", "distribution", "scDiffusion", 0.5, "lower", "difference", 0.06, 0.2,
            "How well a random forest tells synthetic from real by 50 components: 0.5 is a coin toss, 1 is always.",
            "a forest cannot tell them by their principal components", "a forest tells them by their components",
            1.6, high=1.0,
        ),
        Metric(
            "rf_auc_genes", "Forest on genes", "distribution", "scDiffusion", 0.5, "lower", "difference", 0.06, 0.2,
            "The same on the genes themselves: the hardest test here, it sees zeros and whole numbers.",
            "a forest cannot tell them even by single genes", "a forest tells them by single genes",
            1.6, high=1.0,
        ),
        Metric(
            "scc", "Gene means, rank", "genes", "scDiffusion", 1.0, "higher", "difference", 0.01, 0.05,
            "Whether the genes' mean expression comes in the real order (Spearman correlation).",
            "genes have their real mean expression", "some genes are expressed too much or too little",
            0.12, low=-1.0, high=1.0,
        ),
        Metric(
            "pcc", "Gene means, values", "genes", "scDiffusion", 1.0, "higher", "difference", 0.01, 0.05,
            "Whether the genes' mean expression goes with the real one (Pearson correlation).",
            "strongly expressed genes are at their real level", "strongly expressed genes are off their real level",
            low=-1.0, high=1.0,
        ),
        Metric(
            "var_r2", "Gene variances", "genes", "", 1.0, "higher", "difference", 0.025, 0.12,
            "How much of the genes' variance is reproduced (coefficient of determination, 1 is all of it).",
            "genes vary as much as they should", "genes vary too little or too much",
            low=-math.inf, high=1.0,
        ),
        Metric(
            "wasserstein_genes", "Wasserstein, by gene", "genes", "WBDiT, our definition", 0.0, "lower", "ratio",
            1.25, 2.5,
            "How far a gene's values must be moved to be distributed as the real ones, averaged over genes.",
            "single genes are distributed as they should be", "single genes are distributed in another way",
        ),
        Metric(
            "kl_hist", "Histograms, by gene", "genes", "WBDiT, our definition", 0.0, "lower", "ratio", 1.25, 2.5,
            "How much a gene's histogram misses of the real one (50 bins, Kullback-Leibler), averaged over genes.",
            "genes take the values that they should take", "genes miss values that they should take",
        ),
        Metric(
            "corr_fro", "Correlations of genes", "genes", "", 0.0, "lower", "ratio", 1.1, 1.5,
            "How far the correlations between the 500 most variable genes are off (Frobenius distance).",
            "genes go together as they should", "genes go together in another way",
        ),
        Metric(
            "module_ari", "Modules of genes", "genes", "", 1.0, "higher", "difference", 0.08, 0.25,
            "Whether the same genes make up co-expression modules (ten by Ward's method, adjusted Rand index).",
            "co-expression modules are the real ones", "co-expression modules are other ones",
            2.0, low=-0.5, high=1.0,
        ),
        Metric(
            "zero_mae", "Zero fractions", "counts", "", 0.0, "lower", "ratio", 1.25, 2.5,
            "How far the share of cells without a gene is off, averaged over genes.",
            "genes are absent as often as they should be", "genes are absent too often or too rarely",
            high=1.0,
        ),
        Metric(
            "library_w1", "Totals of cells", "counts", "", 0.0, "lower", "ratio", 1.5, 3.0,
            "How far cells' total counts must be moved to be distributed as the real ones (Wasserstein-1, in counts).",
            "cells have their real depth", "cells are too deep, too shallow or too much alike in depth",
        ),
        Metric(
            "detected_w1", "Detected genes", "counts", "", 0.0, "lower", "ratio", 1.5, 3.0,
            "The same of the number of genes that a cell has at all.",
            "cells have as many genes as they should", "cells have too many or too few genes",
        ),
        Metric(
            "lfc_slope", "Fold changes", "labels", "", 1.0, "nearest", "difference", 0.06, 0.15,
            "Generated against real log fold changes between types: under 1, the types differ too little.",
            "types differ as strongly as they should", "the differences between types have the wrong strength",
            1.2, low=-math.inf,
        ),
        Metric(
            "tstr", "Train synthetic, test real", "labels", "", 1.0, "higher", "difference", 0.04, 0.12,
            "Accuracy on real cells of a label classifier that saw synthetic cells only; the floor saw real ones.",
            "labels learned from them hold for real cells", "labels learned from them fail on real cells",
            1.0, high=1.0,
        ),
        Metric(
            "mia_auc", "Membership inference", "memorization", "", 0.5, "lower", "difference", 0.03, 0.1,
            "How well nearness to synthetic cells tells training cells from held-out ones: 0.5 is a coin toss.",
            "training cells are no nearer to them than held-out cells are",
            "training cells can be told by their nearness to them", 1.2, high=1.0,
        ),
        Metric(
            "dcr_ratio", "Distance to training cells", "memorization", "", 1.0, "higher", "difference", 0.02, 0.1,
            "Their median distance to the nearest training cell over that to the nearest held-out cell.",
            "they keep as far from training cells as from held-out ones", "they keep to the training cells", 0.8,
        ),
        Metric(
            "copies", "Copies of training cells", "memorization", "", 0.0, "lower", "difference", 0.01, 0.05,
            "Share of them nearer to a training cell than 99 in 100 training cells are to each other.",
            "they copy training cells no more than chance does", "some copy a training cell", 0.3, high=1.0,
        ),
    )
}  # fmt: skip
