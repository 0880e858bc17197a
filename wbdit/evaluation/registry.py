"""The metrics: meaning, best value, and how to grade a value against the real-against-real floor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Group = Literal[
    "cells", "fidelity", "diversity", "classifiers", "means", "variances", "counts", "differential", "memorization"
]
GROUPS: dict[Group, str] = {
    "cells": "Cells as a whole",
    "fidelity": "Fidelity: each cell is like a real one",
    "diversity": "Diversity: no kind of cell is missing",
    "classifiers": "What a classifier finds",
    "means": "Means of genes and types",
    "variances": "Variances and correlations",
    "counts": "Zeros and counts",
    "differential": "Differential expression",
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
    full
        Whether it is computed only on request, because it takes long.
    elsewhere
        Names of the same quantity in other packages and published scripts, as ``"package: name"``. Given the same
        points and settings, the values are equal: ``tests/evaluation/test_elsewhere.py`` compares them.
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
    full: bool = False
    elsewhere: tuple[str, ...] = ()

    def loss(self, value: float) -> float:
        """Return the distance of a value from the best one, one-sided unless ``direction`` is ``"nearest"``.

        Examples
        --------
        >>> METRICS["scc"].loss(0.75), METRICS["scc"].loss(1.0), METRICS["lfc_slope"].loss(1.5)
        (0.25, 0.0, 0.5)
        """
        away = {"lower": value - self.best, "higher": self.best - value}
        return max(away[self.direction], 0.0) if self.direction in away else abs(value - self.best)


def _calls(suffix: str, between: str) -> list[Metric]:
    """Return the metrics of Wilcoxon tests between types or conditions."""
    share: dict[str, Any] = {"best": 1.0, "direction": "higher", "compare": "difference", "near": 0.06, "far": 0.2}
    share |= {"group": "differential", "family": "", "chance": 1.5, "high": 1.0}
    number = share | {"direction": "nearest", "near": 0.1, "far": 0.3, "chance": 3.0, "high": math.inf}
    return [
        Metric(
            name=f"de_jaccard{suffix}", title=f"Genes called {between}", **share,
            sentence=f"Genes called {between} by a Wilcoxon test in both sets, as a share of those called in either.",
            trust=f"a Wilcoxon test calls the same genes {between}",
            caution=f"a Wilcoxon test calls other genes {between}",
        ),
        Metric(
            name=f"de_precision{suffix}", title=f"Right calls {between}", **share,
            sentence=f"Share of the genes called {between} in synthetic cells that are called in real ones.",
            trust=f"what is called {between} is called in real cells",
            caution=f"genes are called {between} that are not called in real cells",
        ),
        Metric(
            name=f"de_recall{suffix}", title=f"Found calls {between}", **share,
            sentence=f"Share of the genes called {between} in real cells that are called in synthetic ones.",
            trust=f"genes that differ {between} are found", caution=f"genes that differ {between} are missed",
        ),
        Metric(
            name=f"de_calls{suffix}", title=f"Number of calls {between}", **number,
            sentence=f"Number of genes called {between} in synthetic cells, over that in real ones.",
            trust=f"as many genes are called {between} as in real cells",
            caution=f"too many or too few genes are called {between}",
        ),
        Metric(
            name=f"padj_corr{suffix}", title=f"Adjusted p-values {between}", **share | {"low": -1.0},
            sentence=f"Spearman correlation of -log10 adjusted p-values {between}, over what is called in either set.",
            trust=f"p-values {between} rank genes as in real cells",
            caution=f"p-values {between} rank genes otherwise than in real cells",
        ),
    ]  # fmt: skip


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "w1", "Wasserstein-1", "cells", "CFGen", 0.0, "lower", "ratio", 1.05, 1.15,
            "Mean distance that cells must move to turn one set into the other (30 principal components).",
            "cells occupy the same regions as real cells", "cells occupy other regions than real cells",
            elsewhere=("CFGen: 1-Wasserstein",),
        ),
        Metric(
            "w2", "Wasserstein-2", "cells", "CFGen", 0.0, "lower", "ratio", 1.05, 1.15,
            "The same with squared distances, which give outlying cells more weight.",
            "cells lie no farther out than real cells", "some cells lie far from the real cells",
            elsewhere=("CFGen: 2-Wasserstein",),
        ),
        Metric(
            "mmd_cfgen", "MMD, fixed widths", "cells", "CFGen", 0.0, "lower", "ratio", 1.3, 2.5,
            "Difference in density between the two sets, on five fixed length scales (30 principal components).",
            "the density of cells matches real cells",
            "the density of cells is too high in some regions and too low in others",
            elsewhere=("CFGen: RBF_MMD",),
        ),
        Metric(
            "mmd_scdiffusion", "MMD, data widths", "cells", "scDiffusion", 0.0, "lower", "ratio", 1.5, 3.0,
            "The same on length scales from the data (50 joint components): sensitive to a common shift.",
            "the cells as a whole are not shifted", "the cells as a whole are shifted or distorted",
            elsewhere=("scDiffusion: mmd_rbf",),
        ),
        Metric(
            "mmd_raw", "MMD on genes", "cells", "WBDiT, our definition", 0.0, "lower", "ratio", 1.3, 2.5,
            "The same on the genes themselves, without components.",
            "the density matches in gene space too", "the density differs in gene space",
        ),
        Metric(
            "frechet", "Fréchet distance", "cells", "", 0.0, "lower", "ratio", 1.25, 2.0,
            "Distance between the means and covariances of the two sets (30 joint components).",
            "means and covariances of cells match", "means or covariances of cells differ",
        ),
        Metric(
            "energy", "Energy distance", "cells", "", 0.0, "lower", "difference", 0.05, 0.25,
            "How much farther cells of two sets are apart than cells of one set (30 joint components).",
            "distances between the sets are those within a set", "the sets lie apart",
            low=-math.inf,
        ),
        Metric(
            "ilisi", "Mixing of neighbors", "cells", "scDiffusion", 1.0, "higher", "difference", 0.04, 0.15,
            "How evenly the ten nearest neighbors of a cell come from both sets (iLISI, 20 joint components).",
            "neighborhoods mix real and synthetic cells evenly", "real and synthetic cells form separate neighborhoods",
            1.2, high=1.0, elsewhere=("scib-metrics: ilisi_knn(perplexity=10/3)",),
        ),
        Metric(
            "precision", "Precision", "fidelity", "Naeem et al.", 1.0, "higher", "difference", 0.04, 0.12,
            "Share of synthetic cells within reach of a real cell (5 neighbors, 30 joint components).",
            "each synthetic cell lies among real ones", "some synthetic cells lie where there are no real ones",
            1.5, high=1.0, elsewhere=("prdc: precision",),
        ),
        Metric(
            "density", "Density", "fidelity", "Naeem et al.", 1.0, "higher", "difference", 0.08, 0.25,
            "Number of real cells that reach a synthetic cell, over five: 1 if it lies where real cells are dense.",
            "synthetic cells lie where real cells are dense", "synthetic cells lie where real cells are sparse",
            3.0, elsewhere=("prdc: density",),
        ),
        Metric(
            "recall", "Recall", "diversity", "Naeem et al.", 1.0, "higher", "difference", 0.04, 0.12,
            "Share of real cells within reach of a synthetic cell (5 neighbors, 30 joint components).",
            "each real cell lies among synthetic ones", "some real cells are like no synthetic one",
            1.5, high=1.0, elsewhere=("prdc: recall",),
        ),
        Metric(
            "coverage", "Coverage", "diversity", "Naeem et al.", 1.0, "higher", "difference", 0.04, 0.12,
            "Share of real cells that reach a synthetic cell with their five nearest neighbors.",
            "every region of real cells holds synthetic cells", "some regions of real cells hold no synthetic cells",
            1.5, high=1.0, elsewhere=("prdc: coverage",),
        ),
        Metric(
            "rf_auc", "Forest on components", "classifiers", "scDiffusion", 0.5, "lower", "difference", 0.06, 0.2,
            "AUC of a random forest that separates synthetic from real cells (50 joint components): 0.5 is chance.",
            "a random forest cannot tell them from real cells by principal components",
            "a random forest tells them from real cells by principal components",
            1.6, high=1.0, full=True, elsewhere=("scDiffusion: random forest AUC",),
        ),
        Metric(
            "rf_auc_genes", "Forest on genes", "classifiers", "scDiffusion", 0.5, "lower", "difference", 0.06, 0.2,
            "The same on the genes themselves. It is the hardest test here, because it sees zeros and whole numbers.",
            "a random forest cannot tell them from real cells by single genes",
            "a random forest tells them from real cells by single genes",
            1.6, high=1.0, full=True,
        ),
        Metric(
            "c2st_logistic", "Logistic regression", "classifiers", "", 0.5, "lower", "difference", 0.05, 0.2,
            "AUC of a logistic regression on genes that separates synthetic from real cells, cross-validated.",
            "a logistic regression cannot tell them from real cells",
            "a logistic regression tells them from real cells",
            1.6, high=1.0,
        ),
        Metric(
            "c2st_trees", "Boosted trees", "classifiers", "", 0.5, "lower", "difference", 0.05, 0.2,
            "The same for boosted trees, which see zeros and whole numbers.",
            "boosted trees cannot tell them from real cells", "boosted trees tell them from real cells",
            1.6, high=1.0, full=True,
        ),
        Metric(
            "c2st_net", "Neural network", "classifiers", "", 0.5, "lower", "difference", 0.05, 0.2,
            "The same for a network with two hidden layers, which sees correlations of genes.",
            "a neural network cannot tell them from real cells", "a neural network tells them from real cells",
            1.6, high=1.0, full=True,
        ),
        Metric(
            "scc", "Gene means, rank", "means", "scDiffusion", 1.0, "higher", "difference", 0.01, 0.05,
            "Spearman correlation of mean expression per gene: do genes have the real order?",
            "genes have their real mean expression", "some genes are expressed too much or too little",
            0.12, low=-1.0, high=1.0, elsewhere=("scDiffusion: spearman",),
        ),
        Metric(
            "pcc", "Gene means, values", "means", "scDiffusion", 1.0, "higher", "difference", 0.01, 0.05,
            "Pearson correlation of mean expression per gene: do genes have the real levels?",
            "highly expressed genes have their real level", "highly expressed genes deviate from their real level",
            low=-1.0, high=1.0, elsewhere=("scDiffusion: pearson",),
        ),
        Metric(
            "var_r2", "Gene variances", "variances", "", 1.0, "higher", "difference", 0.025, 0.12,
            "Coefficient of determination of gene variances: 1 means that all are reproduced.",
            "genes vary as much as in real cells", "genes vary too little or too much",
            low=-math.inf, high=1.0,
        ),
        Metric(
            "wasserstein_genes", "Wasserstein, by gene", "variances", "WBDiT, our definition", 0.0, "lower", "ratio",
            1.25, 2.5,
            "Wasserstein-1 distance between the values of a gene in the two sets, averaged over genes.",
            "the distributions of single genes match", "the distributions of single genes differ",
        ),
        Metric(
            "kl_hist", "Histograms, by gene", "variances", "WBDiT, our definition", 0.0, "lower", "ratio", 1.25, 2.5,
            "Kullback-Leibler divergence between the histograms of a gene (50 bins), averaged over genes.",
            "genes take all values that they take in real cells", "genes miss values that they take in real cells",
        ),
        Metric(
            "corr_fro", "Gene-gene correlations", "variances", "", 0.0, "lower", "ratio", 1.1, 1.5,
            "Frobenius distance between the correlation matrices of the 500 most variable genes.",
            "genes are correlated as in real cells", "genes are not correlated as in real cells",
        ),
        Metric(
            "module_ari", "Co-expression modules", "variances", "", 1.0, "higher", "difference", 0.08, 0.25,
            "Agreement of the co-expression modules (ten by Ward's method, adjusted Rand index).",
            "co-expression modules match", "co-expression modules differ",
            2.0, low=-0.5, high=1.0, full=True,
        ),
        Metric(
            "within_var", "Variances within types", "variances", "", 0.0, "lower", "ratio", 1.25, 2.0,
            "Relative distance of gene variances within types (500 most variable genes, averaged over types).",
            "cells of a type vary as much as real ones", "cells of a type vary too little or too much",
        ),
        Metric(
            "within_corr", "Correlations within types", "variances", "", 0.0, "lower", "ratio", 1.1, 1.4,
            "Frobenius distance between gene-gene correlations within types (the same genes).",
            "genes are correlated within types as in real cells",
            "genes are not correlated within types as in real cells",
        ),
        Metric(
            "mean_var", "Mean and variance", "variances", "SimBench, our distance", 0.0, "lower", "difference",
            0.03, 0.1,
            "Distance between the curves of a gene's log10 variance over its mean.",
            "variance follows the mean as in real cells", "variance does not follow the mean as in real cells",
        ),
        Metric(
            "cell_cell", "Correlations between cells", "variances", "SimBench, our distance", 0.0, "lower",
            "difference", 0.015, 0.05,
            "Wasserstein-1 distance between the correlations of pairs of cells.",
            "cells are as alike as real ones", "cells are too alike or not alike enough",
        ),
        Metric(
            "zero_mae", "Zero fractions", "counts", "", 0.0, "lower", "ratio", 1.25, 2.5,
            "Absolute difference in the fraction of zeros of a gene, averaged over genes.",
            "genes are undetected as often as in real cells", "genes are undetected too often or too rarely",
            high=1.0,
        ),
        Metric(
            "dropout_mean", "Zeros and mean", "counts", "SimBench, our distance", 0.0, "lower", "difference",
            0.01, 0.04,
            "Distance between the curves of a gene's fraction of zeros over its mean.",
            "zeros follow the mean as in real cells", "there are too many or too few zeros for the mean",
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
            "lfc_slope", "Fold changes", "means", "", 1.0, "nearest", "difference", 0.06, 0.15,
            "Slope of synthetic on real log fold changes between types: under 1, types differ too little.",
            "types differ as strongly as in real cells", "types differ too strongly or too weakly",
            1.2, low=-math.inf,
        ),
        Metric(
            "tstr", "Train synthetic, test real", "means", "", 1.0, "higher", "difference", 0.04, 0.12,
            "Accuracy on real cells of a classifier trained on synthetic cells; for the floor, on other real cells.",
            "a classifier trained on them labels real cells as well as one trained on real cells",
            "a classifier trained on them labels real cells worse than one trained on real cells",
            1.0, high=1.0,
        ),
        *_calls("", "between types"),
        *_calls("_condition", "between conditions"),
        Metric(
            "null_ks", "Tests with nothing to find", "differential", "", 0.0, "lower", "difference", 0.03, 0.1,
            "Distance of p-values between random halves of a type from a uniform distribution.",
            "cells of a type are as independent as real ones", "cells of a type depend on each other: p-values mislead",
            0.5, high=1.0,
        ),
        Metric(
            "null_calls", "Calls with nothing to find", "differential", "", 0.0, "lower", "difference", 0.005, 0.05,
            "Share of genes called between random halves of a type, where nothing is to be found.",
            "no gene is called where there is nothing to find", "genes are called where there is nothing to find",
            high=1.0,
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
        Metric(
            "donor_mia_auc", "Membership of donors", "memorization", "", 0.5, "lower", "difference", 0.1, 0.25,
            "AUC that separates donors with training cells from others, by the likelihood of their held-out cells.",
            "donors of training cells cannot be told from others", "donors of training cells can be told from others",
            high=1.0,
        ),
        Metric(
            "donor_tpr_at_1", "Donors found at 1% error", "memorization", "", 0.01, "lower", "difference", 0.1, 0.3,
            "Share of draws from donors of training cells that score higher than 99% of draws from others.",
            "hardly any donor of training cells stands out", "some donors of training cells stand out",
            high=1.0,
        ),
        Metric(
            "donor_tpr_at_5", "Donors found at 5% error", "memorization", "", 0.05, "lower", "difference", 0.15, 0.35,
            "Share of draws from donors of training cells that score higher than 95% of draws from others.",
            "few donors of training cells stand out", "many donors of training cells stand out",
            high=1.0,
        ),
    )
}  # fmt: skip
