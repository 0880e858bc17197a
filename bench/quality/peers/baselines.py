"""Baselines without a neural network: independent genes, and a Gaussian per label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.decomposition import PCA

from bench.quality.peers.peer import Fitted, Peer, cells_of, joined, rows_by_label
from wbdit.data.expression import to_dense

COMPONENTS = 50


class IndependentGenes(Peer):
    """Each gene's count comes from a random training cell of the label, drawn separately for every gene.

    Every gene has its empirical distribution within the label, and no fitted count distribution can be closer to it.
    Given the label, genes are independent.
    """

    name = "independent"
    title = "independent genes"
    settings: dict[str, Any] = {}  # noqa: RUF012

    def fit(self, train: ad.AnnData, labels: Sequence[str], minutes: float, seed: int) -> Fitted:
        return _Resampled(train, labels)


class _Resampled(Fitted):
    def __init__(self, train: ad.AnnData, labels: Sequence[str]) -> None:
        super().__init__()
        self.labels = tuple(labels)
        self.genes = train.var_names
        self.counts = to_dense(train.X)
        self.rows = rows_by_label(joined(train.obs, labels))

    def generate(self, obs: pd.DataFrame, seed: int) -> ad.AnnData:
        rng = np.random.default_rng(seed)
        columns = np.arange(len(self.genes))
        counts = np.empty((len(obs), len(self.genes)), np.float32)
        for label, wanted in rows_by_label(joined(obs, self.labels)).items():
            donors = rng.choice(self.rows[label], (len(wanted), len(self.genes)))
            counts[wanted] = self.counts[donors, columns]
        return cells_of(counts, obs, self.genes)


class PcaGaussian(Peer):
    """A Gaussian of full covariance for each label, on 50 principal components of ln(1 + count).

    Values are converted to counts by ``round(expm1)``, with negative values set to zero. The residuals of the
    components are independent Gaussians with each gene's residual variance within the label (probabilistic PCA, Tipping
    and Bishop 1999, with one variance per gene).
    """

    name = "pca-gaussian"
    title = "PCA, Gaussian"

    @property
    def settings(self) -> dict[str, Any]:
        return {"components": COMPONENTS, "residuals": True}

    def fit(self, train: ad.AnnData, labels: Sequence[str], minutes: float, seed: int) -> Fitted:
        return _Gaussians(train, labels, seed)


class _Gaussians(Fitted):
    def __init__(self, train: ad.AnnData, labels: Sequence[str], seed: int) -> None:
        super().__init__()
        self.labels = tuple(labels)
        self.genes = train.var_names
        values = np.log1p(to_dense(train.X, np.float64))
        self.pca = PCA(min(COMPONENTS, min(values.shape) - 1), svd_solver="randomized", random_state=seed)
        scores = self.pca.fit_transform(values)
        left = values - self.pca.inverse_transform(scores)
        self.of = {
            label: (scores[rows].mean(0), np.cov(scores[rows].T), left[rows].mean(0), left[rows].std(0, ddof=1))
            for label, rows in rows_by_label(joined(train.obs, labels)).items()
        }
        k, g = self.pca.components_.shape
        self.parameters = (k + 1) * g + len(self.of) * (k + k * (k + 1) // 2 + 2 * g)

    def generate(self, obs: pd.DataFrame, seed: int) -> ad.AnnData:
        rng = np.random.default_rng(seed)
        counts = np.empty((len(obs), len(self.genes)))
        for label, wanted in rows_by_label(joined(obs, self.labels)).items():
            mean, covariance, shift, spread = self.of[label]
            scores = rng.multivariate_normal(mean, np.atleast_2d(covariance), len(wanted), method="svd")
            values = self.pca.inverse_transform(scores) + rng.normal(shift, spread, (len(wanted), len(self.genes)))
            counts[wanted] = np.rint(np.expm1(np.maximum(values, 0)))
        return cells_of(sp.csr_matrix(counts), obs, self.genes)
